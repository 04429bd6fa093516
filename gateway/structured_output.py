"""`response_format`, `structured_outputs` and the older `guided_*` fields to one StructuredOutput message."""

from __future__ import annotations

from typing import Any

from stepwire.v1 import inference_pb2

from gateway.errors import ApiError
from gateway.field_names import Names
from gateway.schemas import GenerationBody, ResponseFormat, StructuredOutputs
from gateway.structural_tag import read_structural_tag, schema_text


def read_structured_output(
    body: GenerationBody,
) -> tuple[inference_pb2.StructuredOutput | None, Names]:
    """The format asked for, if any, and what its fields are called in this body. Raises `ApiError`."""
    asked: dict[str, Any] = {}
    if body.response_format is not None and body.response_format.type != "text":
        asked["response_format"] = body.response_format
    if body.structured_outputs is not None and body.structured_outputs.model_fields_set:
        asked["structured_outputs"] = body.structured_outputs
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        value = getattr(body, name)
        if value is not None:
            asked[name] = value
    if not asked:
        return None, {}
    if len(asked) > 1:
        first, second, *_ = asked
        raise ApiError(400, f"{second}: cannot be used together with {first}.", param=second)
    ((name, value),) = asked.items()
    if isinstance(value, ResponseFormat):
        return _of_response_format(value)
    if isinstance(value, StructuredOutputs):
        return _of_structured_outputs(value)
    return _of_constraint(name, name.removeprefix("guided_"), value)


def _of_response_format(value: ResponseFormat) -> tuple[inference_pb2.StructuredOutput, Names]:
    if value.type == "structural_tag":
        return _of_constraint("response_format", "structural_tag", {"type": value.type, **(value.model_extra or {})})
    if value.type == "json_object":
        return inference_pb2.StructuredOutput(json_object=inference_pb2.JsonObject()), {
            "structured_output": "response_format"
        }
    param = "response_format.json_schema"
    if value.json_schema is None:
        raise ApiError(400, f"{param}: needed when type is 'json_schema'.", param=param)
    message = inference_pb2.StructuredOutput()
    if value.json_schema.json_schema is None:
        message.json_object.SetInParent()
    else:
        message.json_schema = schema_text(f"{param}.schema", value.json_schema.json_schema)
    return message, {"structured_output.json_schema": f"{param}.schema", "structured_output": "response_format"}


def _of_structured_outputs(value: StructuredOutputs) -> tuple[inference_pb2.StructuredOutput, Names]:
    constraints = {
        "json": value.json_,
        "regex": value.regex,
        "choice": value.choice,
        "grammar": value.grammar,
        "json_object": value.json_object or None,
        "structural_tag": value.structural_tag,
    }
    given = {kind: constraint for kind, constraint in constraints.items() if constraint is not None}
    if len(given) != 1:
        found = f"not {', '.join(given)}" if given else "and none is given"
        raise ApiError(
            400,
            f"structured_outputs: exactly one of {', '.join(constraints)} is taken, {found}.",
            param="structured_outputs",
        )
    ((kind, constraint),) = given.items()
    message, names = _of_constraint(f"structured_outputs.{kind}", kind, constraint)
    message.compact_json = bool(value.disable_any_whitespace)
    return message, names


def _of_constraint(param: str, kind: str, value: Any) -> tuple[inference_pb2.StructuredOutput, Names]:
    message = inference_pb2.StructuredOutput()
    match kind:
        case "json":
            message.json_schema = schema_text(param, value)
            field = "json_schema"
        case "regex":
            message.regex = value
            field = "regex"
        case "choice":
            message.choice.texts.extend(value)
            field = "choice.texts"
        case "grammar":
            message.grammar.text = value
            field = "grammar.text"
        case "json_object":
            message.json_object.SetInParent()
            field = "json_object"
        case _:
            message = read_structural_tag(param, value)
            field = str(message.WhichOneof("format"))
    whole = field.partition(".")[0]
    return message, {
        f"structured_output.{field}": param,
        f"structured_output.{whole}": param,
        "structured_output": param,
    }
