"""VQA's official normalisation of answers: what the challenge's evaluation does to an answer before it compares it.

What looks odd here is the official behaviour: a sign is taken out where it stands beside a blank *anywhere* in the answer (or where
the answer has a number with a comma) and becomes a blank otherwise, and "somebody'd" loses its apostrophe.

Source: the evaluation code of the VQA challenge (github.com/GT-Vision-Lab/VQA, vqaEval.py), its rules and tables.
"""

import re
from typing import Final

_NUMBERS: Final = {
    word: str(number) for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}


_ARTICLES: Final = frozenset({"a", "an", "the"})


_SIGNS: Final = ';/[]"{}()=+\\_-><@`,?!'


_COMMA_IN_NUMBER: Final = re.compile(r"\d,\d")


# The official pattern means to spare full stops between digits, but spares those before a digit only.
_FULL_STOP: Final = re.compile(r"\.(?!\d)")


_FULL_STOPS_TAKEN: Final = 32  # the official code passes a flag where the number of replacements stands


# Spellings that lost their apostrophe: "wrong:right".
_PAIRS: Final = """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've didnt:didn't
doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't hed:he'd
hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've
itll:it'll let's:let's maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't
mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've
shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll
somebodys:somebody's someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's
somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's
thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've
werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's
whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're
whys:why's wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all
yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
you'dve:you'd've youll:you'll youre:you're youve:you've
"""


_CONTRACTIONS: Final = {wrong: right for wrong, _, right in (pair.partition(":") for pair in _PAIRS.split())}


def strip_punctuation(answer: str) -> str:
    """The official handling of signs: away beside a blank or where a number has a comma, a blank elsewhere; no full stops."""
    comma_in_number = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for sign in _SIGNS:
        beside_blank = f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if beside_blank or comma_in_number else " ")
    return _FULL_STOP.sub("", text, count=_FULL_STOPS_TAKEN)


def normalise_answer(answer: str) -> str:
    """An answer as the official evaluation compares it: small letters, no articles, digits for number words, signs taken out."""
    text = strip_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
