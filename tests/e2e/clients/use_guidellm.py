"""guidellm: a benchmark of chat and one of completions, both streamed. Run as a program: the server's URL, the model.

Its prompts are in a file, because made-up ones would need a tokenizer from the network.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

REQUESTS, TOKENS = 6, 12


def main(url: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            {"prompt": f"What is {i} plus {i}? Tell me a story.", "output_tokens_count": TOKENS}
            for i in range(REQUESTS)
        ]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for path in ("/v1/chat/completions", "/v1/completions"):
            report = folder / "report.json"
            report.unlink(missing_ok=True)
            command = [
                str(Path(sys.executable).with_name("guidellm")), "run",
                "--backend", f"kind=openai_http,target={url},request_format={path}",
                "--data", f"kind=json_file,path={folder}/prompts.jsonl",
                "--profile", "kind=concurrent,streams=2",
                "--constraint", f"kind=max_requests,count={REQUESTS}",
                "--output", f"kind=json,path={report}",
                "--disable-console-interactive",
            ]  # fmt: skip
            subprocess.run(command, check=True)
            (done,) = json.loads(report.read_text())["benchmarks"]
            totals = done["metrics"]["request_totals"]
            assert totals["successful"] == REQUESTS, totals
            assert totals["errored"] == totals["incomplete"] == 0, totals
            for request in done["requests"]["successful"]:
                assert request["output_metrics"]["text_tokens"] == TOKENS, request
                assert request["input_metrics"]["text_tokens"] > 10, request
                assert request["time_to_first_token_ms"] > 0, request


main(*sys.argv[1:])
