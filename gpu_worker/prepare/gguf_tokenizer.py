"""Builds `tokenizer.json` and `tokenizer_config.json` from the vocabulary in a GGUF file.

Three kinds of vocabulary exist in practice. `gpt2`: byte-level BPE with its merges, cut by the pattern that
`tokenizer.ggml.pre` names. `llama`: SentencePiece BPE with a score per piece and byte fallback; its merges are
recovered from the scores, as the piece with the best score is merged first. `gemma4`: the same with its merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.prepare.byte_level_splits import BYTE_LEVEL_SPLITS, DEFAULT_SPLIT_NAME

# Values of tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character

# Control tokens with which instruct models end a turn. Older files name only the end of a document as EOS.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|eom_id|>")


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """What the files of a prepared model say about text.

    Attributes:
        tokenizer: to be saved as `tokenizer.json`.
        config: the content of `tokenizer_config.json`.
        eos_token_ids: every id that ends an answer, the file's EOS first.
        notes: lines a person should see.
    """

    tokenizer: Tokenizer
    config: dict[str, Any]
    eos_token_ids: list[int]
    notes: list[str]


def build_tokenizer(path: Path, metadata: Mapping[str, Any], context_length: int) -> GgufTokenizer:
    """The tokenizer of the GGUF file at `path` with this metadata.

    Raises:
        CheckpointError: the vocabulary is damaged or of a kind that is not known.
    """
    vocabulary = _Vocabulary(path, metadata)
    model = metadata.get("tokenizer.ggml.model")
    notes: list[str] = []
    if model == "gpt2":
        tokenizer, add_bos = _build_byte_level(vocabulary, notes)
    elif model == "llama":
        tokenizer, add_bos = _build_sentencepiece(vocabulary, _merges_from_scores(vocabulary)), True
    elif model == "gemma4":
        tokenizer, add_bos = _build_sentencepiece(vocabulary, _stored_merges(vocabulary)), True
    else:
        raise CheckpointError(
            path,
            f"has a tokenizer of the kind {model!r}, and only 'gpt2', 'llama' and 'gemma4' are known",
            advice="use the safetensors version of the model, which has a tokenizer.json",
        )
    add_bos = vocabulary.flag("add_bos_token", add_bos)
    add_eos = vocabulary.flag("add_eos_token", False)
    _add_special_tokens(tokenizer, vocabulary)
    _add_bos_and_eos(tokenizer, vocabulary, add_bos, add_eos)
    config = _tokenizer_config(vocabulary, add_bos, add_eos, context_length)
    return GgufTokenizer(tokenizer, config, _eos_token_ids(vocabulary), notes)


class _Vocabulary:
    """The tokenizer's part of the metadata, checked."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._metadata = metadata
        self.tokens: list[str] = self.array("tokens")
        self.types: list[int] = self.array("token_type", default=[NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise self.fail(f"has {len(self.tokens)} tokens and {len(self.types)} token types")
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            first = next(token_id for token_id, token in enumerate(self.tokens) if self.ids[token] != token_id)
            token = self.tokens[first]
            raise self.fail(f"has the token {token!r} twice, as {first} and as {self.ids[token]}")

    def fail(self, reason: str) -> CheckpointError:
        advice = "use the safetensors version of the model, which has a tokenizer.json"
        return CheckpointError(self.path, f"its tokenizer {reason}", advice=advice)

    def array(self, key: str, default: list[Any] | None = None) -> list[Any]:
        values = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(values, list) or not values:
            raise self.fail(f"lacks the metadata key 'tokenizer.ggml.{key}'")
        return values

    def get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._metadata.get(f"tokenizer.ggml.{key}", default))

    def special(self, name: str) -> tuple[int, str] | None:
        """Id and text of a special token such as `bos`, None if the file has none."""
        token_id = self.get(f"{name}_token_id")
        if token_id is None:
            return None
        if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            raise self.fail(f"says that its {name} token is {token_id!r}, and has {len(self.tokens)} tokens")
        return token_id, self.tokens[token_id]

    def of_type(self, token_type: int) -> list[str]:
        return [token for token, its_type in zip(self.tokens, self.types, strict=True) if its_type == token_type]

    def chat_templates(self) -> dict[str, str]:
        """Name to template; the one without a name is `default`."""
        templates = {}
        for key, value in self._metadata.items():
            if key == "tokenizer.chat_template":
                templates["default"] = value
            elif key.startswith("tokenizer.chat_template."):
                templates[key.removeprefix("tokenizer.chat_template.")] = value
        return templates


def _build_byte_level(vocabulary: _Vocabulary, notes: list[str]) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether it begins with BOS unless the file says otherwise."""
    name = vocabulary.get("pre")
    if name is None:
        notes.append(
            f"{vocabulary.path.name} does not say how its text is cut (tokenizer.ggml.pre): the default is used, and "
            "answers may be worse than the model's own; a newer conversion of the model says it"
        )
        name = DEFAULT_SPLIT_NAME
    split = BYTE_LEVEL_SPLITS.get(name)
    if split is None:
        known = ", ".join(sorted(BYTE_LEVEL_SPLITS))
        raise vocabulary.fail(f"cuts text in the unknown way {name!r} (tokenizer.ggml.pre); known are: {known}")
    merges = _stored_merges(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=split.whole_words))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=vocabulary.flag("add_space_prefix", False), use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def _stored_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    return [_parse_merge(vocabulary, number, merge) for number, merge in enumerate(vocabulary.array("merges"))]


def _parse_merge(vocabulary: _Vocabulary, number: int, merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    for piece in (left, right, left + right):
        if not separator or piece not in vocabulary.ids:
            raise vocabulary.fail(f"has the merge {merge!r} (number {number}), and {piece!r} is not among its tokens")
    return left, right


def _build_sentencepiece(vocabulary: _Vocabulary, merges: list[tuple[str, str]]) -> Tokenizer:
    unknown = vocabulary.special("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=merges,
            unk_token=unknown[1] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    mark_spaces = normalizers.Replace(" ", SPACE_MARK)
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.flag("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), mark_spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = mark_spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the piece with the best score first.

    SentencePiece merges the neighbours that form the piece with the highest score, which as a list of merges is this
    order. Equal scores are in the order of the vocabulary.
    """
    scores = vocabulary.array("scores")
    if len(scores) != len(vocabulary.tokens):
        raise vocabulary.fail(f"has {len(vocabulary.tokens)} tokens and {len(scores)} scores")
    mergeable = {
        token: token_id for token, token_id in vocabulary.ids.items() if vocabulary.types[token_id] in (NORMAL, UNUSED)
    }
    merges: list[tuple[float, int, str, str]] = []
    for token, token_id in mergeable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-scores[token_id], token_id, left, right))
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens are found whole in text and left out of decoded text; user-defined ones are found whole only."""
    special = vocabulary.of_type(CONTROL)
    for name in ("bos", "eos", "unknown", "padding"):
        token = vocabulary.special(name)
        if token is not None and token[1] not in special:
            special.append(token[1])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    user_defined = [token for token in vocabulary.of_type(USER_DEFINED) if token not in set(special)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])
    if tokenizer.get_vocab_size() != len(vocabulary.tokens):
        raise vocabulary.fail(
            f"has {len(vocabulary.tokens)} tokens, and {tokenizer.get_vocab_size()} with its special tokens added"
        )


def _add_bos_and_eos(tokenizer: Tokenizer, vocabulary: _Vocabulary, add_bos: bool, add_eos: bool) -> None:
    bos = _needed(vocabulary, "bos") if add_bos else None
    eos = _needed(vocabulary, "eos") if add_eos else None
    if bos is None and eos is None:
        return
    before = [bos[1]] if bos else []
    after = [eos[1]] if eos else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token[1], token[0]) for token in (bos, eos) if token is not None],
    )


def _needed(vocabulary: _Vocabulary, name: str) -> tuple[int, str]:
    token = vocabulary.special(name)
    if token is None:
        raise vocabulary.fail(f"asks for a {name} token in every text (add_{name}_token) and names none")
    return token


def _tokenizer_config(vocabulary: _Vocabulary, add_bos: bool, add_eos: bool, context_length: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
    }
    for name in ("bos", "eos", "unknown", "padding"):
        token = vocabulary.special(name)
        short = {"unknown": "unk", "padding": "pad"}.get(name, name)
        config[f"{short}_token"] = token[1] if token else None
    templates = vocabulary.chat_templates()
    if set(templates) == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": template} for name, template in templates.items()]
    return config


def _eos_token_ids(vocabulary: _Vocabulary) -> list[int]:
    ids = [token[0] for name in ("eos", "eot", "eom") if (token := vocabulary.special(name)) is not None]
    templates = "".join(vocabulary.chat_templates().values())
    ids += [vocabulary.ids[token] for token in _TURN_ENDS if token in vocabulary.ids and token in templates]
    return list(dict.fromkeys(ids))
