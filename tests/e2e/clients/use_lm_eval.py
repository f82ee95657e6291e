"""lm-eval: choices by likelihood, the likelihood of a text, generation, and chat. Run as a program: the server's URL, the model.

Its tasks are small and made here, so that nothing is downloaded. Tokens are the server's own.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

FACTS = [
    ("The capital of France is", [" Paris", " Rome", " Madrid", " Berlin"]),
    ("Water freezes to", [" ice", " iron", " wood", " music"]),
    ("The sun rises in the", [" east", " spoon", " table", " seven"]),
    ("One, two, three,", [" four", " horse", " green", " nobody"]),
]
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/facts.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "text": """
task: text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/facts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} and so on, as everybody knows."
metric_list: [{metric: word_perplexity}]
""",
    "answers": """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/facts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def main(url: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = (json.dumps({"question": question, "choices": choices}) for question, choices in FACTS)
        (folder / "facts.jsonl").write_text("\n".join(rows))
        for task, text in TASKS.items():
            (folder / f"{task}.yaml").write_text(text.replace("FOLDER", name))
        manager = TaskManager(include_path=name, include_defaults=False)
        own = f"model={model},num_concurrent=2,max_retries=1,max_length=2048"

        def run(kind: str, path: str, tasks: list[str], **more):
            arguments = f"{own},base_url={url}/v1/{path}"
            return lm_eval.simple_evaluate(
                model=kind, model_args=arguments, tasks=tasks, task_manager=manager, bootstrap_iters=0, **more
            )

        done = run("local-completions", "completions", ["choices", "text", "answers"])
        assert done["results"]["choices"]["acc,none"] >= 0.75, done["results"]
        assert 1 < done["results"]["text"]["word_perplexity,none"] < 1e6, done["results"]
        for sample in done["samples"]["choices"]:
            likelihoods = [float(one[0]) for one in sample["filtered_resps"]]
            assert len(likelihoods) == 4
            assert all(math.isfinite(one) and one < 0 for one in likelihoods)
        assert all(sample["resps"][0][0] for sample in done["samples"]["answers"])
        chat = run("local-chat-completions", "chat/completions", ["answers"], apply_chat_template=True)
        assert all(sample["resps"][0][0] for sample in chat["samples"]["answers"])


main(*sys.argv[1:])
