"""How every process takes its settings: flags, STEPWIRE_* variables, a YAML file and defaults, in this precedence.

A process declares one frozen subclass of `ProcessSettings` whose fields all have descriptions, and calls
`parse_settings`. Nothing else in it reads the environment.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

import yaml
from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError


def _split_commas(value: object) -> object:
    """Lists are written a,b,c in a flag or a variable, and as a list in YAML."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return [piece.strip() for part in value for piece in part.split(",") if piece.strip()]
    return value


PositiveInt = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Strings = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_commas)]
TokenCounts = Annotated[tuple[PositiveInt, ...], NoDecode, BeforeValidator(_split_commas)]


class _YamlFileSource(PydanticBaseSettingsSource):
    """The file that `--config` or STEPWIRE_CONFIG names; keys are field names, with _ or - between words."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("the file is read as a whole")

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if not path:
            return {}
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        except yaml.YAMLError as error:
            raise SettingsError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise SettingsError(f"--config: {path} must hold 'name: value' lines, not a {type(values).__name__}")
        return {str(name).replace("-", "_"): value for name, value in values.items()}


class ProcessSettings(BaseSettings):
    """What every process has. Subclasses set `program`, the command that starts them."""

    model_config = SettingsConfigDict(
        env_prefix="STEPWIRE_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_parse_none_str="unset",
        cli_implicit_flags=True,
        cli_kebab_case=True,
        protected_namespaces=(),
    )
    program: ClassVar[str]
    # Flags that users of another program will try -> what to do instead.
    advice: ClassVar[Mapping[str, str]] = {}

    config: Path | None = Field(None, description="YAML file with these settings; flags and variables win over it")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["text", "json"] = Field(
        "text", description="log lines on stderr: for people, or one JSON object each"
    )
    exit_with_parent: bool = Field(False, description="end when the process that started this one is gone")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The flags' source is put in front of these by pydantic-settings.
        return init_settings, env_settings, _YamlFileSource(settings_cls)


SettingsType = TypeVar("SettingsType", bound=ProcessSettings)


def parse_settings(settings_class: type[SettingsType], argv: Sequence[str]) -> SettingsType:
    """Settings from flags (without the program's name), environment and file.

    A mistake ends the process with exit code 2 and one line that names the flag and says what to do; the values of
    secrets are never printed.
    """
    known_flags = [f"--{name.replace('_', '-')}" for name in settings_class.model_fields]
    try:
        return settings_class(_cli_parse_args=list(argv), _cli_prog_name=settings_class.program)  # type: ignore[call-arg]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "_".join(str(part) for part in first["loc"][:1])
        if not name:
            _refuse(settings_class, first["msg"].removeprefix("Value error, "))
        flag = f"--{name.replace('_', '-')}"
        if first["type"] == "extra_forbidden":
            advice = _advise(settings_class, [flag], known_flags)
            _refuse(settings_class, f"{name} in the configuration file is not a setting{advice}")
        field = settings_class.model_fields.get(name)
        is_secret = field is not None and "Secret" in str(field.annotation)
        given = "" if is_secret else f", got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        # What the values mean says which of them was meant.
        meaning = f": {field.description}" if field is not None and first["type"] == "literal_error" else ""
        _refuse(settings_class, f"{flag} (STEPWIRE_{name.upper()}): {message}{given}{meaning}")
    except SettingsError as error:
        message = " ".join(str(error).removeprefix("error parsing CLI: ").split())
        if message.startswith("unrecognized"):
            message += _advise(settings_class, message.split()[2:], known_flags)
        _refuse(settings_class, message)


def _advise(settings_class: type[ProcessSettings], unknown: Sequence[str], known_flags: list[str]) -> str:
    """What to do about arguments that are not known: about all of another program's, else about the first."""
    if not unknown[0].startswith("-"):
        return ": lists are written with commas, as a,b"
    found = {}
    for word in unknown:
        flag = word.partition("=")[0].replace("_", "-")
        short = flag if flag.startswith("--") else flag[:2]
        for name in (flag, flag.replace("--no-", "--", 1), short):
            if name in settings_class.advice:
                found[flag] = settings_class.advice[name]
                break
    if found:
        return "".join(f"; {flag}: {advice}" for flag, advice in found.items())
    return _suggest(unknown[0], known_flags)


def _suggest(flag: str, known_flags: list[str]) -> str:
    close = difflib.get_close_matches(flag.split("=")[0], known_flags, n=1)
    return f": did you mean {close[0]}?" if close else ""


def _refuse(settings_class: type[ProcessSettings], message: str) -> NoReturn:
    print(f"{settings_class.program}: {message} (--help explains every setting)", file=sys.stderr)
    raise SystemExit(2)
