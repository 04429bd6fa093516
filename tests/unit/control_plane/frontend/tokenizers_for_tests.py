"""Small tokenizers of each kind, trained or written out here: no file is needed."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = (
    """The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.
def schedule(requests): return sorted(requests, key=lambda request: request.priority)
Größe, naïve café, señor. 東京は日本の首都です。 Привет, мир! 안녕하세요. 🙂🚀👩‍👩‍👧 ½ ≤ €
user assistant system im_start im_end end of turn <tag> </tag> [INST] 0123456789
"""
    * 4
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind: bytes, ChatML's special tokens as ids 0 to 2, one more token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken("<\uff5cweiß und grün\uff5c>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def _sentence_piece_vocabulary() -> dict[str, int]:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABCDEF .,!é東<>/|_",
        "▁a",
        "▁th",
        "▁▁",
        "the",
        "ing",
        "▁the",
        "</",
        "s>",
    ]
    return {piece: token_id for token_id, piece in enumerate(dict.fromkeys(pieces))}


@cache
def sentence_piece(kind: str = "llama") -> Tokenizer:
    """Byte fallback: `llama` strips the text's first blank, `gemma` does not, `metaspace` marks words its own way."""
    vocab = _sentence_piece_vocabulary()
    merges = [("▁", "a"), ("▁", "▁"), ("<", "/")]
    merges += [("</", "s>")] if kind == "forging" else []
    if kind == "forging":
        merges.insert(0, ("s", ">"))
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(chain if kind == "gemma" else [*chain, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    vocab = {
        piece: index
        for index, piece in enumerate(["[UNK]", "[SEP]", "play", "##ing", "##ed", "the", ".", "don", "'", "t"])
    }
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


@cache
def bpe_with_suffix() -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate(["a", "b", "a</w>", "b</w>", "ab", "ab</w>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b</w>")], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


@cache
def without_decoder() -> Tokenizer:
    vocab = {word: index for index, word in enumerate(["one", "two", "three", "\ufffd", ""])}
    return Tokenizer(models.WordLevel(vocab, unk_token="one"))
