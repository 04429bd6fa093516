"""The real tokenizer and chat template of the default model, beside what transformers makes of the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from control_plane.frontend.served_model import ServedModel, load_served_model


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> ServedModel:
    return load_served_model(smollm2_dir)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12345 + 1? 東京 🙂"},
    {"role": "assistant", "content": "12346"},
    {"role": "user", "content": "def f(x):\n\treturn x  # <b>"},
]


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2]], ids=["long", "short"])
async def test_a_conversation_has_the_ids_that_transformers_gives(
    smollm2: ServedModel, smollm2_dir: Path, messages: list[dict[str, str]]
) -> None:
    assert smollm2.tokenizer is not None and smollm2.chat_template is not None
    ids, _ = await smollm2.tokenizer.encode_chat(
        smollm2.chat_template, messages, max_chars=10_000, continue_final_message=False
    )
    reference = PreTrainedTokenizerFast.from_pretrained(smollm2_dir)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.tolist() == expected


async def test_streamed_text_is_the_text(smollm2: ServedModel) -> None:
    text = "Größe 12345, “naïve” café — 東京は日本の首都です。 🙂👩‍👩‍👧\n\tdef f(): ...  ½ Привет" * 3
    assert smollm2.tokenizer is not None
    ids = (await smollm2.tokenizer.encode_text(text, add_special_tokens=False)).tolist()
    detokenizer = smollm2.tokenizer.detokenization.start(skip_special_tokens=True)
    deltas = [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.finish()]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


def test_it_ends_at_the_end_of_a_turn(smollm2: ServedModel) -> None:
    assert smollm2.tokenizer is not None
    assert smollm2.tokenizer.token_id("<|im_end|>") in smollm2.eos_token_ids
