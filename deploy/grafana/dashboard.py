"""The Grafana dashboard as code: `python deploy/grafana/dashboard.py` writes dashboards/dsa-serve.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "dashboards" / "dsa-serve.json"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_OWN = 'job=~"$job"'


def _quantiles(name: str) -> list[tuple[str, str]]:
    return [
        (
            f"p{round(100 * share)}",
            f"histogram_quantile({share}, sum by (le) (rate({name}_bucket{{{_OWN}}}[$__rate_interval])))",
        )
        for share in (0.5, 0.95, 0.99)
    ]


def _rate(name: str, by: str, where: str = "") -> str:
    return f"sum by ({by}) (rate({name}{{{_OWN}{where}}}[$__rate_interval]))"


def _hourly(name: str, where: str = "") -> str:
    return f"3600 * sum(rate({name}{{{_OWN}{where}}}[$__rate_interval]))"


def _million(phase: str) -> list[tuple[str, str]]:
    """Metered USD a million tokens of a phase by context length; lengths that nobody asks for are left out."""
    tokens = _rate("dsa_context_tokens_total", "context", f',phase="{phase}"')
    return [
        (
            f"{{{{context}}}} {legend}",
            "1e6 * "
            + _rate("dsa_context_cost_usd_total", "context", f',phase="{phase}",attention="{attention}"')
            + f" / ({tokens} > 0)",
        )
        for legend, attention in (("as it is", "actual"), ("were it dense", "dense_equivalent"))
    ]


def _rows() -> str:
    """Rows that the engine computed a second: tokens kept, and drafts that were not."""
    kept = "rate(dsa_engine_prefill_tokens_total{own}[w]) + rate(dsa_engine_decode_tokens_total{own}[w])"
    lost = "rate(dsa_spec_decode_draft_tokens_total{own}[w]) - rate(dsa_spec_decode_accepted_tokens_total{own}[w])"
    return f"({kept} + {lost})".replace("own", _OWN).replace("[w]", "[$__rate_interval]")


# Title, unit, [(legend, query)]; three panels a row.
PANELS: tuple[tuple[str, str, list[tuple[str, str]]], ...] = (
    ("Engines up", "short", [("{{instance}}", f"dsa_engine_up{{{_OWN}}}")]),
    ("Requests by outcome", "reqps", [("{{outcome}}", _rate("dsa_requests_total", "outcome"))]),
    (
        "Requests in the engine",
        "short",
        [
            ("running {{instance}}", f"dsa_requests_running{{{_OWN}}}"),
            ("waiting {{instance}}", f"dsa_requests_waiting{{{_OWN}}}"),
        ],
    ),
    ("Tokens", "short", [("{{kind}} a second", _rate("dsa_tokens_total", "kind"))]),
    ("Time to first token", "s", _quantiles("dsa_time_to_first_token_seconds")),
    ("Time per output token", "s", _quantiles("dsa_time_per_output_token_seconds")),
    ("Time of a request", "s", _quantiles("dsa_e2e_request_latency_seconds")),
    ("Time in the queue", "s", _quantiles("dsa_request_queue_seconds")),
    (
        "Tokens a step",
        "short",
        [
            (
                "{{instance}}",
                f"(rate(dsa_engine_prefill_tokens_total{{{_OWN}}}[$__rate_interval])"
                f" + rate(dsa_engine_decode_tokens_total{{{_OWN}}}[$__rate_interval]))"
                f" / rate(dsa_engine_steps_total{{{_OWN}}}[$__rate_interval])",
            )
        ],
    ),
    ("KV cache held by requests", "percentunit", [("{{instance}}", f"dsa_kv_cache_usage_ratio{{{_OWN}}}")]),
    (
        "Prompt tokens found in the prefix cache",
        "percentunit",
        [
            (
                "{{instance}}",
                f"rate(dsa_prefix_cache_hits_tokens_total{{{_OWN}}}[$__rate_interval])"
                f" / rate(dsa_prefix_cache_queries_tokens_total{{{_OWN}}}[$__rate_interval])",
            )
        ],
    ),
    (
        "Draft tokens",
        "short",
        [
            (
                "guessed a second",
                f"sum(rate(dsa_spec_decode_draft_tokens_total{{{_OWN}}}[$__rate_interval]))",
            ),
            (
                "right a second",
                f"sum(rate(dsa_spec_decode_accepted_tokens_total{{{_OWN}}}[$__rate_interval]))",
            ),
        ],
    ),
    (
        "Preemptions and engine restarts",
        "short",
        [
            ("preemptions {{instance}}", f"rate(dsa_preemptions_total{{{_OWN}}}[$__rate_interval])"),
            ("restarts {{instance}}", f"increase(dsa_engine_restarts_total{{{_OWN}}}[$__rate_interval])"),
        ],
    ),
    ("Time between deliveries of tokens", "s", _quantiles("dsa_inter_token_latency_seconds")),
    ("Rejections by reason", "reqps", [("{{reason}}", _rate("dsa_rejections_total", "reason"))]),
    (
        "Charged by class, an hour",
        "currencyUSD",
        [("{{class}}", "3600 * " + _rate("dsa_cost_usd_total", "class"))],
    ),
    (
        "Charged beside metered, an hour",
        "currencyUSD",
        [
            ("charged", _hourly("dsa_cost_usd_total")),
            ("metered", _hourly("dsa_metered_cost_usd_total", ',attention="actual"')),
            (
                "metered, were it dense",
                _hourly("dsa_metered_cost_usd_total", ',attention="dense_equivalent"'),
            ),
        ],
    ),
    ("A million prompt tokens by context, metered", "currencyUSD", _million("prefill")),
    ("A million output tokens by context, metered", "currencyUSD", _million("decode")),
    (
        "Device seconds a second, sparse beside dense",
        "short",
        [
            ("as it is", f"sum(rate(dsa_engine_busy_seconds_total{{{_OWN}}}[$__rate_interval]))"),
            (
                "were it dense",
                f"sum(rate(dsa_engine_dense_equivalent_seconds_total{{{_OWN}}}[$__rate_interval]))",
            ),
        ],
    ),
    (
        "Indexer's share of step time",
        "percentunit",
        [
            (
                "{{instance}}",
                f"rate(dsa_engine_index_seconds_total{{{_OWN}}}[$__rate_interval])"
                f" / rate(dsa_engine_busy_seconds_total{{{_OWN}}}[$__rate_interval])",
            )
        ],
    ),
    (
        "Selected tokens a row",
        "short",
        [
            (
                "{{instance}}",
                f"rate(dsa_engine_selected_tokens_total{{{_OWN}}}[$__rate_interval]) / {_rows()}",
            )
        ],
    ),
    (
        "Sentinels",
        "short",
        [
            (f"{what} {{{{instance}}}}", f"increase({name}{{{_OWN}}}[$__rate_interval])")
            for what, name in (
                ("rows that the ledger could not take", "dsa_ledger_errors_total"),
                ("refused edits of the price table", "dsa_price_table_errors_total"),
                ("requests with logits that are not finite", "dsa_nonfinite_logits_total"),
                ("requests with an invalid selection", "dsa_invalid_selections_total"),
                ("answers that end in a loop", "dsa_token_loops_total"),
                ("failed steps", "dsa_engine_failed_steps_total"),
            )
        ],
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model."""
    return {
        "uid": "dsa-serve",
        "title": "dsa-serve",
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"},
                {
                    "name": "job",
                    "type": "query",
                    "label": "Job",
                    "datasource": _SOURCE,
                    "query": "label_values(dsa_engine_up, job)",
                    "refresh": 2,
                    "includeAll": True,
                    "multi": True,
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": [
            {
                "id": index + 1,
                "type": "timeseries",
                "title": title,
                "datasource": _SOURCE,
                "gridPos": {"x": index % 3 * 8, "y": index // 3 * 8, "w": 8, "h": 8},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(65 + number), "datasource": _SOURCE, "expr": expr, "legendFormat": legend}
                    for number, (legend, expr) in enumerate(queries)
                ],
            }
            for index, (title, unit, queries) in enumerate(PANELS)
        ],
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
