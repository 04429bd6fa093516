# ruff: noqa: RUF001
"""How byte-level BPE vocabularies cut text before merging, by the name GGUF files give it (`tokenizer.ggml.pre`).

Names, groups and patterns are those that llama.cpp goes by (https://github.com/ggml-org/llama.cpp,
`src/llama-vocab.cpp`); the NFC step is that of transformers' Qwen and Cohere tokenizers. A wrong pattern
gives ids that look right and a model that answers badly, so a name that is not listed is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ByteLevelSplit:
    """One way to cut text.

    Attributes:
        patterns: applied one after the other, each cutting the pieces of the one before into matches and gaps.
        whole_words: a piece that is in the vocabulary is taken whole, whatever the merges say (`ignore_merges`).
        add_bos: whether the sequence begins with BOS when the file does not say.
        nfc: the text is brought to Unicode's NFC first.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NEWLINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_NEWLINES_AND_SPACES}"
)
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_NEWLINES_AND_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_NEWLINES_AND_SPACES}"
)
_SEED_CODER = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_NEWLINES_AND_SPACES}"
)
_UPPER_THEN_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_ALONE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_TEKKEN = rf"{_UPPER_THEN_LOWER}|{_UPPER_ALONE}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_NEWLINES_AND_SPACES}"
_GPT4O = (
    rf"{_UPPER_THEN_LOWER}{_CONTRACTIONS}?|{_UPPER_ALONE}{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_NEWLINES_AND_SPACES}"
)
_CJK_AND_HANGUL = r"[一-龥ࠀ-一가-퟿]+"
# The cased letters that DeepSeek LLM's pattern lists; newer Unicode versions have more. Some are escaped because text
# tools normalise those characters to others.
_DEEPSEEK_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗ"
    "Ａ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_CASED}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    _CJK_AND_HANGUL,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_AND_HANGUL, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_NEWLINES_AND_SPACES}",
)
# Runs of Han stand alone. Moonshot's own pattern, of which llama.cpp has an approximation.
_NOT_HAN = r"&&[^\p{Han}]"
_UPPER, _LOWER = (
    rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}]",
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}]",
)
_KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_NEWLINES_AND_SPACES}"
)
# Digits in threes, counted from the last.
_TINY_AYA = (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)
_SUPERBPE = (r"\p{N}+", r"(?=(\d{3})+(?!\d))")
_YOUTU = (
    r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
    _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}"),
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_MINICPM5 = (
    r"\p{N}{1,3}",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_NEWLINES_AND_SPACES}",
)
# Spaces by powers of 2.
_JAIS2 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
    + r"|\s"
)
_PORO = r" ?[^(\s|.,!?…。，、।۔،)]+"

_SPLIT_GPT2 = ByteLevelSplit((_GPT2,))
_SPLIT_DIGITS_GPT2 = ByteLevelSplit((r"\p{N}", _GPT2))
_SPLIT_LLAMA3 = ByteLevelSplit((_LLAMA3,))
_SPLIT_LLAMA3_WHOLE_WORDS = ByteLevelSplit((_LLAMA3,), whole_words=True, add_bos=True)
_SPLIT_QWEN2 = ByteLevelSplit((_QWEN2,))
_SPLIT_GPT4O = ByteLevelSplit((_GPT4O,))

# Files without a name, and those named "default", were cut like this by the program that wrote them.
DEFAULT_SPLIT_NAME = "default"

BYTE_LEVEL_SPLITS: Mapping[str, ByteLevelSplit] = {
    DEFAULT_SPLIT_NAME: ByteLevelSplit((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    **dict.fromkeys(
        (
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "granite-docling",
        ),
        _SPLIT_GPT2,
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"),
        _SPLIT_DIGITS_GPT2,
    ),
    "command-r": ByteLevelSplit(_SPLIT_DIGITS_GPT2.patterns, nfc=True),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        _SPLIT_LLAMA3_WHOLE_WORDS,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _SPLIT_LLAMA3),
    **dict.fromkeys(("qwen2", "f2llmv2"), ByteLevelSplit((_QWEN2,), nfc=True)),
    "qwen35": ByteLevelSplit((_QWEN35,), nfc=True),
    **dict.fromkeys(
        ("deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan", "solar-open", "grok-2"), _SPLIT_QWEN2
    ),
    "deepseek-llm": ByteLevelSplit(_DEEPSEEK_LLM),
    "deepseek-coder": ByteLevelSplit(_DEEPSEEK_CODER),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), ByteLevelSplit(_DEEPSEEK_V3)),
    "falcon": ByteLevelSplit((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "tekken": ByteLevelSplit((_TEKKEN,), whole_words=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _SPLIT_GPT4O),
    "seed-coder": ByteLevelSplit((_SEED_CODER,)),
    "kimi-k2": ByteLevelSplit((_KIMI,)),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), ByteLevelSplit(_TINY_AYA, nfc=True)),
    "youtu": ByteLevelSplit(_YOUTU, whole_words=True),
    "superbpe": ByteLevelSplit(_SUPERBPE),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), ByteLevelSplit((_BAILING,))),
    "exaone-moe": ByteLevelSplit((_EXAONE_MOE,)),
    "minicpm5": ByteLevelSplit(_MINICPM5, whole_words=True),
    "jais-2": ByteLevelSplit((_JAIS2,)),
    "laguna": ByteLevelSplit((r"[^\n]+|\n+", _QWEN2)),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), ByteLevelSplit((_PORO,))),
    "viking": ByteLevelSplit((_PORO, r"\p{N}")),
}
