"""Random JSON schemas of what is enforced: nesting, enums, references, numbers, patterns, unions, other scripts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_NAMES = [
    "name",
    "größe",
    "城市",
    "is_ok",
    "a b",
    'quo"te',
    "back\\slash",
    "émile",
    "x",
    "items",
    "ключ",
    "🙂",
]
_PATTERNS = [
    "^[a-z]{1,4}$",
    "^[A-Z][a-z]{0,3}-[0-9]{2}$",
    "^(red|green|blau)$",
    "^[αβγ]{1,3}$",
    "^\\d{3}$",
    "^x+y?$",
]
_FORMATS = ["date", "uuid", "ipv4", "date-time"]


def random_schema(seed: int) -> Schema:
    """A schema of its seed; at its root is an object, as OpenAI's clients have it, in most cases."""
    rng = random.Random(seed)
    if rng.random() < 0.12:
        return _any(rng, 2)
    schema = _object(rng, 3)
    kind = rng.random()
    if kind < 0.15:  # definitions that are used twice
        schema["$defs"] = {"part": _any(rng, 1), "unit": _string(rng)}
        schema["properties"]["ref"] = {"$ref": "#/$defs/part"}
        schema["properties"]["refs"] = {"type": "array", "items": {"$ref": "#/$defs/unit"}, "maxItems": 2}
        schema["required"] += ["ref", "refs"]
    elif kind < 0.25:  # a tree
        schema["$defs"] = {
            "node": {
                "type": "object",
                "properties": {
                    "value": _number(rng),
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        }
        schema["properties"]["tree"] = {"$ref": "#/$defs/node"}
        schema["required"].append("tree")
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    kinds: list[Callable[[random.Random, int], Schema]] = [_string, _number, _enum, _plain]
    if depth > 0:
        kinds += [_object, _array, _union]
    return rng.choice(kinds)(rng, depth)


def _plain(rng: random.Random, depth: int = 0) -> Schema:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}


def _string(rng: random.Random, depth: int = 0) -> Schema:
    kind = rng.random()
    if kind < 0.35:
        return {"type": "string", "pattern": rng.choice(_PATTERNS)}
    if kind < 0.5:
        return {"type": "string", "format": rng.choice(_FORMATS)}
    low = rng.randrange(3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(1, 6)}


def _number(rng: random.Random, depth: int = 0) -> Schema:
    kind = rng.choice(["integer", "number"])
    low = rng.randrange(-50, 50)
    schema: Schema = {"type": kind, "minimum": low, "maximum": low + rng.randrange(1, 1000)}
    if rng.random() < 0.3:
        schema = {"type": kind, "exclusiveMinimum": low, "maximum": low + 9}
    if kind == "integer" and rng.random() < 0.3:
        schema["multipleOf"] = rng.choice([2, 5])
    return schema


def _enum(rng: random.Random, depth: int = 0) -> Schema:
    values: list[Any] = ["red", "grün", "蓝", 1, 2.5, True, None, "a\nb", {"k": [1]}, [], -0.25]
    chosen = rng.sample(values, rng.randrange(1, 5))
    return {"const": chosen[0]} if rng.random() < 0.2 else {"enum": chosen}


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(2)
    schema: Schema = {"type": "array", "items": _any(rng, depth - 1), "minItems": low, "maxItems": low + 2}
    if rng.random() < 0.25:
        schema = {"type": "array", "prefixItems": [_any(rng, 0), _any(rng, 0)], "items": False, "minItems": 2}
    return schema


def _union(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.5:
        return {"anyOf": [_any(rng, depth - 1), {"type": "null"}]}
    one = {"type": "object", "properties": {"kind": {"const": "one"}, "v": _string(rng)}}
    two = {"type": "object", "properties": {"kind": {"const": "two"}, "v": _number(rng)}}
    return {
        "anyOf": [part | {"required": ["kind", "v"], "additionalProperties": False} for part in (one, two)]
    }


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randrange(1, 4))
    properties = {name: _any(rng, depth - 1) for name in names}
    optional = rng.random() < 0.3
    required = [name for name in names if not (optional and rng.random() < 0.5)]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
