"""A folder with tasks of lm-evaluation-harness that need no network: choices, the loss of texts, generated answers."""

import json

WHO = ["cat", "dog", "hen", "fox", "owl", "cow"]
WHERE = ["mat", "hill", "road", "roof", "lake", "barn"]

CHOICE = """
task: which
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/which.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
metadata: {version: 1}
"""

ROLLING = """
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/prose.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte}
  - {metric: word_perplexity}
metadata: {version: 2}
"""

GENERATED = """
task: finish
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/finish.jsonl}, cache_dir: FOLDER/cache}
test_split: test
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{end}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 20, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
metadata: {version: 3}
"""

TASKS = {"which": CHOICE, "prose": ROLLING, "finish": GENERATED}


def sentence(i):
    return f"the {WHO[i % 6]} sat on the {WHERE[i * i % 6]}."


def prose():
    """Texts of different lengths, the last of them long."""
    return [" ".join(sentence(i + n) for n in range(1 + 3 * i)) + " é 語" for i in range(6)]


def documents():
    """Task -> its documents."""
    starts = [sentence(i).rpartition(" ")[0] for i in range(12)]
    return {
        "which": [
            {
                "question": start,
                "choices": [WHERE[(i * i + 1) % 6], WHERE[i * i % 6], "very old roof"],
                "answer": i % 4 % 2 if i % 5 else 2,
            }
            for i, start in enumerate(starts)
        ],
        "prose": [{"text": text} for text in prose()],
        "finish": [
            {"start": sentence(i + 1) + " " * (i % 2) + start, "end": " " + WHERE[i * i % 6]}
            for i, start in enumerate(starts[:9])
        ],
    }


def write_tasks(folder):
    """The folder, with the tasks of TASKS in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)))
        lines = (json.dumps(document) + "\n" for document in documents()[name])
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder
