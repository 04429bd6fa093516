"""The model as clients see it: its names, its text side if it has one, and its defaults."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from stepwire.process.model_names import name_of_directory

from control_plane.frontend.chat_template import ChatTemplate
from control_plane.frontend.detokenizer import Detokenization
from control_plane.frontend.model_files import ModelFilesError, read_model_files
from control_plane.frontend.parsers.registry import OutputFormat
from control_plane.frontend.template_traits import ToolsPlace
from control_plane.frontend.tokenizer import TextTokenizer

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """Without a tokenizer it takes and gives token ids only."""

    # The first is the name in answers; empty: the worker's own name for its model.
    names: tuple[str, ...] = ()
    tokenizer: TextTokenizer | None = None
    chat_template: ChatTemplate | None = None
    eos_token_ids: frozenset[int] = frozenset()
    # Subset of SamplingParams' fields, from generation_config.json.
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    # How tool calls and reasoning are read in what it writes.
    output_format: OutputFormat = field(default_factory=lambda: OutputFormat("", ""))
    # Detokenization that shows the marks of that.
    marked_detokenization: Detokenization | None = None
    created_s: int = field(default_factory=lambda: int(time.time()))

    def name(self, worker_model: str) -> str:
        """The name to answer with; a worker may call its model by a directory, of which only the last part is shown."""
        return self.names[0] if self.names else Path(worker_model).name or worker_model

    def is_served_as(self, name: str, worker_model: str) -> bool:
        return not name or name in self.names or name == self.name(worker_model)


def load_served_model(
    directory: Path | None,
    *,
    names: Sequence[str] = (),
    chat_template_file: Path | None = None,
    num_tokenizer_threads: int = 2,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
) -> ServedModel:
    """Read the text side of a model directory.

    Raises:
        ModelFilesError: something in it is damaged; the message names the file.
    """
    files = read_model_files(directory, chat_template_file)
    if directory is not None and not names:
        names = (name_of_directory(directory),)
    tokenizer = None
    template = None
    eos_token_ids = files.eos_token_ids
    if files.tokenizer_file is not None:
        tokenizer = TextTokenizer.from_file(files.tokenizer_file, num_threads=num_tokenizer_threads)
        eos_token_id = tokenizer.token_id(files.special_tokens.get("eos_token", ""))
        if eos_token_id is not None:
            eos_token_ids |= {eos_token_id}
        if files.chat_template is not None:
            template = ChatTemplate(files.chat_template, files.special_tokens)
    elif chat_template_file is not None:
        raise ModelFilesError(
            f"--chat-template {chat_template_file}: it needs a tokenizer, and --model has no tokenizer.json."
        )
    else:
        log.warning("no tokenizer.json: this server takes and gives token ids only")
    if tokenizer is not None and not eos_token_ids:
        log.warning("no eos_token_id in the model's files: sequences end at max_tokens or at the context's end")
    output_format = OutputFormat("", "")
    if template is not None:
        output_format = OutputFormat.choose(
            template.source,
            tool_call_parser,
            reasoning_parser,
            shows_tools=template.traits.tools is not ToolsPlace.NOWHERE,
        )
    return ServedModel(
        tuple(names),
        tokenizer,
        template,
        eos_token_ids,
        files.sampling_defaults,
        output_format,
        None if tokenizer is None else tokenizer.show(output_format.marks),
    )
