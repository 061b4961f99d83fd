"""How lmms-eval asks and scores the needle videos' questions; copied into the task's folder."""

import os


def doc_to_visual(doc):
    return [os.path.join(doc["folder"], doc["video"])]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    # Nothing around it: the needle model knows no other words.
    return doc["question"]


def process_results(doc, results):
    """1 or 0, among all questions and among those of its skill."""
    score = float(results[0].strip() == doc["answer"])
    return {"accuracy": score, doc["skill"]: score}
