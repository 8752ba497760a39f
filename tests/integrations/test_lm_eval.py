"""lm-eval's model "hf" scores our folder as upstream's, on a task of three lines."""

import json

import pytest

pytestmark = pytest.mark.integrations

QUESTIONS = [
    {"question": "Who sat on the mat?", "choices": ["the cat", "the dog", "nobody"], "answer": 0},
    {"question": "What is after ab?", "choices": ["abcd", "bc", "zz"], "answer": 1},
    {"question": "Why?", "choices": ["so", "because", "no"], "answer": 2},
]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks (JSON is YAML) and their lines."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = folder / "questions.jsonl"
    lines.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(lines)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"small_{name}"} | source | task))
    return folder


def evaluate(folder, tasks):
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[f"small_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )


def test_scores_as_upstream(folders, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    results = {kind: evaluate(folder, tasks) for kind, folder in folders.items()}
    ours, theirs = results["ours"], results["upstream"]
    assert ours["results"] == theirs["results"] and ours["results"].keys() == {f"small_{name}" for name in TASKS}
    for name in ours["samples"]:
        answers = [[sample["resps"] for sample in result["samples"][name]] for result in (ours, theirs)]
        assert answers[0] == answers[1] and len(answers[0]) == len(QUESTIONS)
