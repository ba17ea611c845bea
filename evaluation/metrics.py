"""Metrics of visual question answering as `evaluate.Metric` classes, which need no network.

    VQAAccuracy().compute(predictions=["2"], references=[["two"] * 9 + ["3"]])  # {"accuracy": 1.0}

All of them take the generated texts as predictions and return proportions. docs/research/papers.md says what differs
from the authors' own code.
"""

import re
from typing import Any

from datasets import Features, List, Value
from evaluate import Metric, MetricInfo

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS.split())}}
# A contraction that lacks one of its apostrophes gets it back.
WHOLE = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS.split()
    for place, sign in enumerate(word)
    if sign == "'"
}
WHOLE["somebody'd"] = "somebodyd"  # so in the official code


def normalise(answer: str) -> str:
    """Return a text in lower case, without surrounding space or a full stop."""
    return answer.strip().rstrip(".").lower()


def normalise_vqa(answer: str) -> str:
    """Return an answer as VQA's official evaluation compares it (Antol et al. 2015; visualqa.org/evaluation.html).

    Punctuation goes, and leaves a space where it stood between words; so do full stops that no digit follows, and
    articles. Number words become digits, and contractions get a missing apostrophe back.
    """
    has_thousands = re.search(r"\d,\d", answer) is not None
    spaced = answer
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in answer or f" {sign}" in answer
        spaced = spaced.replace(sign, "" if beside_space or has_thousands else " ")
    words = re.sub(r"\.(?!\d)", "", spaced).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(WHOLE.get(word, word) for word in words if word not in ARTICLES)


def normalise_textvqa(answer: str) -> str:
    """Return an answer as M4C's evaluation, which scores TextVQA, compares it (Hu et al. 2020, arXiv 1911.06258).

    As `normalise_vqa`, but commas and question marks leave no space, and 's is a word of its own.
    """
    return normalise_vqa(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def one_line(text: str) -> str:
    """Return a text with spaces for newlines and tabs, and none around it."""
    return re.sub(r"[\n\t]", " ", text).strip()


def leave_one_out(prediction: str, answers: list[str]) -> float:
    """Return the mean over the annotators of min(1, how many of the others gave this answer / 3)."""
    matches = [answer == prediction for answer in answers]
    return sum(min(1, (sum(matches) - match) / 3) for match in matches) / len(matches)


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """Return `leave_one_out` as in the official code of VQA, which normalizes only if the annotators differ."""
    texts = [one_line(text) for text in (prediction, *answers)]
    normalise_all = normalise_vqa if len(set(texts[1:])) > 1 else str.lower
    prediction, *answers = map(normalise_all, texts)
    return leave_one_out(prediction, answers)


def textvqa_accuracy(prediction: str, answers: list[str]) -> float:
    """Return `leave_one_out` as in the evaluation of M4C, which always normalizes the prediction and the answers."""
    prediction, *answers = (normalise_textvqa(one_line(text)) for text in (prediction, *answers))
    return leave_one_out(prediction, answers)


def says_yes(text: str) -> bool:
    """Return whether a text means yes, as POPE reads it: its first sentence has no "no" or "not" between spaces."""
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def option_letter(text: str) -> str | None:
    """Return the letter of "B", "B.", "B. a cat" or "The answer is B", as LLaVA's evaluation finds it, or None."""
    text = text.strip().replace("\n", ". ")
    found = re.match(r"([A-E])(?:\.?$|\. )", text)
    found = found or re.search(r"The answer is ([A-E])\.", text) or re.search(r"The answer is ([A-E])", text)
    return found and found[1]


class AnswerMetric(Metric):
    """What the metrics share: predictions are texts, and nothing is written to disk."""

    reference = Value("string")

    def __init__(self, **kwargs):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def score(self, prediction: str, reference: Any) -> float:
        """Return how right one answer is, from 0 to 1."""
        raise NotImplementedError

    def _compute(self, predictions: list[str], references: list) -> dict[str, float]:
        scores = [self.score(found, answer) for found, answer in zip(predictions, references, strict=True)]
        return {"accuracy": sum(scores) / len(scores)}

    def _info(self) -> MetricInfo:
        features = Features({"predictions": Value("string"), "references": self.reference})
        return MetricInfo(description=type(self).__doc__, citation="", inputs_description="", features=features)


class ExactMatch(AnswerMetric):
    """Share of answers that equal the reference except for case, surrounding space and a full stop; GQA's accuracy.

    Where some references are yes or no, also `yes_excess`: the share of yes among the answers to these questions, less
    the share among their references. A model that sees what is not there has a positive one.
    """

    def score(self, prediction: str, reference: str) -> float:
        return float(normalise(prediction) == normalise(reference))

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = zip(map(normalise, predictions), map(normalise, references), strict=True)
        closed = [(found, answer) for found, answer in pairs if answer in ("yes", "no")]
        yes = [found == "yes" for found, _ in closed], [answer == "yes" for _, answer in closed]
        excess = {"yes_excess": (sum(yes[0]) - sum(yes[1])) / len(closed)} if closed else {}
        return super()._compute(predictions, references) | excess


def edit_distance(one: str, other: str) -> int:
    """Return how many characters to insert, remove or replace to make one text another (Levenshtein 1966)."""
    row = [*range(len(other) + 1)]
    for number, character in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            kept = diagonal + (character != wanted)
            diagonal, row[place] = row[place], min(kept, row[place] + 1, row[place - 1] + 1)
    return row[-1]


class CharacterErrors(ExactMatch):
    """`ExactMatch`, and `cer`, the character error rate: edit distance of all answers, over their references' length.

    Case, surrounding space and a full stop don't count. An answer that goes on and on may make it more than 1.
    """

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        pairs = [*zip(map(normalise, predictions), map(normalise, references), strict=True)]
        errors, length = sum(edit_distance(*pair) for pair in pairs), sum(len(answer) for _, answer in pairs)
        return super()._compute(predictions, references) | {"cer": errors / max(1, length)}


class VQAAccuracy(AnswerMetric):
    """VQA accuracy (Antol et al. 2015), leave-one-out over the ten answers, of VQAv2."""

    reference = List(Value("string"))

    def score(self, prediction: str, reference: list[str]) -> float:
        return vqa_accuracy(prediction, reference)


class TextVQAAccuracy(AnswerMetric):
    """Accuracy of TextVQA (Singh et al. 2019, arXiv 1904.08920): VQA accuracy whose texts are always normalized."""

    reference = List(Value("string"))

    def score(self, prediction: str, reference: list[str]) -> float:
        return textvqa_accuracy(prediction, reference)


class POPE(AnswerMetric):
    """Object hallucination (Li et al. 2023, arXiv 2305.10355): accuracy, precision, recall and F1 of yes; yes-rate."""

    def score(self, prediction: str, reference: str) -> float:
        return float(says_yes(prediction) == (normalise(reference) == "yes"))

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        found = [says_yes(prediction) for prediction in predictions]
        truth = [normalise(answer) == "yes" for answer in references]
        hits, claims, objects = sum(map(all, zip(found, truth, strict=True))), sum(found), sum(truth)
        return super()._compute(predictions, references) | {
            "precision": hits / max(1, claims),
            "recall": hits / max(1, objects),
            "f1": 2 * hits / max(1, claims + objects),
            "yes_rate": claims / len(found),
        }


class ScienceQA(AnswerMetric):
    """Share of right option letters (Lu et al. 2022, arXiv 2209.09513); an answer that names no letter is wrong."""

    def score(self, prediction: str, reference: str) -> float:
        return float(option_letter(prediction) == reference)
