"""How lmms-eval asks and scores VNBench's questions; copied into the task's folder."""

import os
from collections import defaultdict

LETTERS = "ABCD"


def doc_to_visual(doc):
    return [os.path.join(doc["folder"], doc["video"])]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    options = [f"{letter}. {option}" for letter, option in zip(LETTERS, doc["options"])]
    last = "Answer with the option's letter from the given choices directly."
    return "\n".join([doc["question"], *options, last])


def process_results(doc, results):
    """Right or wrong, by VNBench's own reading of an answer."""
    said = results[0].split(".")[0]
    letter = next((letter for letter in LETTERS if letter in said), None)
    score = float(letter == doc["answer"])
    told = {"video": doc["video"], "type": doc["type"], "score": score}
    return {"vnbench": told, "one_try": score}


def aggregate(results):
    """The mean over question types of the share of videos of which all four tries are right."""
    tries = defaultdict(lambda: defaultdict(list))
    for told in results:
        tries[told["type"]][told["video"]].append(told["score"])
    shares = [sum(map(all, videos.values())) / len(videos) for videos in tries.values()]
    return sum(shares) / len(shares)
