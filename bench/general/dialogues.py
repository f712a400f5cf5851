"""Questions and answers: recipes, help pages, frequently asked questions, programs, facts, translations."""

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from bench.general import packages as p
from bench.general.cleaning import joined, markdown
from bench.general.documents import Document, dialogue, is_clean, is_english
from bench.general.english import country_name
from bench.general.packages import texts

RECIPE_WORDS = {
    "en": (
        (
            "How do I make {}?",
            "Can you give me a recipe for {}?",
            "I would like to cook {}. How is it done?",
            "Recipe for {}, please.",
        ),
        ("What do I need for {}?", "Which ingredients go into {}?"),
        ("And what do I do with them?", "Thanks! How is it made?"),
        ("You need:", "Ingredients:"),
        ("Then:", "Steps:", "Method:"),
        "It serves {}.",
    ),
    "de": (
        ("Wie macht man {}?", "Hast du ein Rezept für {}?", "Ich möchte {} kochen. Wie geht das?"),
        ("Was brauche ich für {}?", "Welche Zutaten hat {}?"),
        ("Und wie wird es gemacht?", "Danke! Wie geht es dann weiter?"),
        ("Du brauchst:", "Zutaten:"),
        ("Dann:", "Zubereitung:"),
        "Das reicht für {}.",
    ),
}


def recipes(folder: Path) -> list[Document]:
    found = []
    for language, tag in (("en", "en-us"), ("de", "de-de")):
        ((_, text),) = texts(p.RECIPES, folder, f"*/data/recipes_{tag}.json")
        for recipe in json.loads(text).values():
            words = json.dumps(recipe, ensure_ascii=False)
            good = len(recipe["steps"]) >= 3 and len(recipe["ingredients"]) >= 3 and is_clean(words)
            if good and not re.search(r"''|\(\)|\(/|/\)|\(cup|#|\*|http|\|", words):
                found.append(_recipe(recipe, language))
    return found


def _recipe(recipe: dict[str, Any], language: str) -> Document:
    """A recipe asked for at once, or in two turns."""
    pick = random.Random(recipe["title"]).choice
    whole, parts, onwards, need, then, serves = RECIPE_WORDS[language]
    title, servings = recipe["title"], recipe["servings"]
    list_ = "\n".join(f"- {item}" for item in recipe["ingredients"])
    steps = "\n".join(f"{i}. {step}" for i, step in enumerate(recipe["steps"], 1))
    end = "\n\n" + serves.format(servings) if servings else ""
    if pick((True, False, False)):
        return dialogue(
            [pick(parts).format(title), f"{pick(need)}\n\n{list_}{end}", pick(onwards), steps], language=language
        )
    answer = f"{pick(need)}\n\n{list_}\n\n{pick(then)}\n\n{steps}{end}"
    return dialogue([pick(whole).format(title), answer], language=language)


HOW = {
    "C": "How do I {}?",
    "de": "Wie geht das: {}?",
    "fr": "Comment faire : {} ?",
    "es": "¿Cómo se hace? {}",
    "ru": "Как это сделать: {}?",
    "pt_BR": "Como fazer: {}?",
    "it": "Come si fa: {}?",
    "ko": "{}: 어떻게 하나요?",
    "uk": "Як це зробити: {}?",
    "pl": "Jak to zrobić: {}?",
    "zh_CN": "怎么做：{}？",
    "ta": "{}: எப்படி?",
    "mr": "{}: कसे करायचे?",
    "gu": "{}: કેવી રીતે?",
    "el": "Πώς γίνεται: {};",
    "ja": "{}にはどうすればよいですか？",
    "nl": "Hoe doe ik dit: {}?",
    "sv": "Hur gör jag: {}?",
    "hu": "Hogyan: {}?",
    "id": "Bagaimana caranya: {}?",
}
MALLARD = "{http://projectmallard.org/1.0/}"
Page = list[str]


def help_pages(folder: Path, language: str) -> list[Document]:
    """GNOME's help in one language: a page's title asks, the page answers. Pages with English left in them are passed over."""
    code, found = "en" if language == "C" else language.split("_")[0], []
    for title, *answer in _pages(folder, language).values():
        foreign = language != "C" and any(is_english(block) for block in [title, *answer])
        if foreign or not is_clean(joined(answer)) or len(joined(answer)) < 250:
            continue
        subject = title
        if language == "C" and not title.isupper():
            subject = (title[:1].lower() + title[1:]).replace(" your ", " my ").replace(" you ", " I ")
        question = title if title.endswith(("?", "？", ";")) else HOW[language].format(subject)
        found.append(dialogue([question, joined(answer)], language=code))
    return found


@cache
def _pages(folder: Path, language: str) -> dict[str, Page]:
    """Title, then blocks, of every page in a language that tells how to do something, by its file's name."""
    pages = texts(p.GNOME, folder, f"*/help/{language}/gnome-help/*.page")
    trees = {Path(path).stem: ElementTree.fromstring(text) for path, text in pages}
    titles = {name: " ".join(tree.findtext(f"{MALLARD}title", "").split()) for name, tree in trees.items()}
    found = {}
    for name, tree in trees.items():
        blocks = _blocks(tree, titles)
        if blocks and titles[name] and (tree.get("style") == "task" or titles[name].endswith(("?", "？"))):
            found[name] = [titles[name], *blocks]
    return found


def _words(element: ElementTree.Element, titles: dict[str, str]) -> str:
    """An element's words: a link without any has its page's title, keys pressed at once have a plus between them."""
    tag = element.tag.removeprefix(MALLARD)
    inner = [_words(child, titles) for child in element]
    if tag == "keyseq":
        words = "+".join(inner)
    else:
        tails = [child.tail or "" for child in element]
        words = (element.text or "") + "".join(a + b for a, b in zip(inner, tails, strict=True))
    if tag == "link" and not words.strip():
        words = f"“{titles.get(element.get('xref', '').split('#')[0], '')}”"
    return "" if tag == "media" else words


def _blocks(parent: ElementTree.Element, titles: dict[str, str], prefix: str = "") -> Page:
    """Paragraphs, headings and items under an element; nothing where it holds what has no place in plain text."""
    found: Page = []
    for child in parent:
        tag = child.tag.removeprefix(MALLARD)
        words = " ".join(_words(child, titles).split())
        if tag == "p" and words:
            found.append(prefix + words)
            prefix = "  " if prefix else ""
        elif tag == "title" and parent.tag == f"{MALLARD}section":
            found.append(f"## {words}")
        elif tag in ("steps", "list"):
            for number, item in enumerate(child.findall(f"{MALLARD}item"), 1):
                found += _blocks(item, titles, f"{number}. " if tag == "steps" else "- ")
        elif tag in ("section", "note", "example"):
            found += _blocks(child, titles)
        elif tag not in ("info", "title", "links", "media", "comment"):
            return []
    return found


def translations(folder: Path) -> list[Document]:
    """Paragraphs of the help pages with their translations, a few in a row."""
    names = {
        "de": "German",
        "fr": "French",
        "es": "Spanish",
        "ru": "Russian",
        "pt_BR": "Portuguese",
        "ko": "Korean",
        "uk": "Ukrainian",
        "pl": "Polish",
        "zh_CN": "Chinese",
        "el": "Greek",
        "sv": "Swedish",
        "hu": "Hungarian",
    }
    english, found = _pages(folder, "C"), []
    for language, name in names.items():
        for file, page in _pages(folder, language).items():
            original = english.get(file, [])
            both = zip(original, page, strict=False)
            pairs = [(a, b) for a, b in both if 80 < len(a) < 500 and not is_english(b) and not a.startswith("#")]
            if len(original) == len(page) and len(pairs) >= 2 and is_clean(joined(page)):
                found.append(_translation(pairs[:3], name, language.split("_")[0], random.Random(file + language)))
    return found


def _translation(pairs: list[tuple[str, str]], name: str, language: str, chance: random.Random) -> Document:
    """A conversation of translations, from English or into it."""
    into = chance.random() < 0.6
    ask = f"Translate into {name if into else 'English'}:"
    pairs = [(re.sub(r"^(\d+\.|-) ", "", a), re.sub(r"^(\d+\.|-) ", "", b)) for a, b in pairs]
    both = pairs if into else [(b, a) for a, b in pairs]
    turns = [f"{ask}\n\n{both[0][0]}", both[0][1]]
    for source, target in both[1:]:
        turns += [source, target]
    return dialogue(turns, language=language)


def questions_on_python(folder: Path) -> list[Document]:
    """The questions of Python's FAQs, one to three of a chapter in a row."""
    found: list[Document] = []
    for path, html in texts(p.PYTHON_DOC, folder, "*/html/faq/*.html"):
        if path.endswith(("index.html", "installed.html")):
            continue
        body = html[html.index('role="main">') + 12 : html.index('<div class="clearer">', html.index('role="main">'))]
        asked: list[list[str]] = []
        for block in markdown(body):
            block = block.replace("¶", "")
            if re.match(r"#+ .*\?$", block):
                asked.append([block.lstrip("# ")])
            elif block.startswith("#"):
                asked.append([])
            elif asked and asked[-1]:
                asked[-1].append(block)
        pairs = [(q, joined(answer)) for q, *answer in (a for a in asked if len(a) > 1)]
        found += _in_a_row([pair for pair in pairs if is_clean(pair[1])], path)
    return found


def _in_a_row(pairs: list[tuple[str, str]], seed: str) -> list[Document]:
    """Conversations of one to three questions and their answers."""
    chance, found = random.Random(Path(seed).name), []
    while pairs:
        count = chance.choice((1, 1, 2, 3))
        found.append(dialogue([turn for pair in pairs[:count] for turn in pair]))
        pairs = pairs[count:]
    return found


def programs(folder: Path) -> list[Document]:
    """Programs asked for and given."""
    ((_, text),) = texts(p.CHATS, folder, "*/data/english/coding.yml")
    unique = {question: answer for question, answer, *_ in yaml.safe_load(text)["conversations"]}
    pairs = [(q[:1].upper() + q[1:], a) for q, a in unique.items() if len(a) > 120 and is_clean(a)]
    return _in_a_row(pairs, "programs")


FACTS = (
    ("Government", "Capital", "name", "What is the capital of {}?"),
    ("Geography", "Location", "", "Where is {}?"),
    ("Geography", "Climate", "", "What is the climate of {} like?"),
    ("Geography", "Terrain", "", "Describe the terrain of {}."),
    ("Geography", "Natural resources", "", "Which natural resources does {} have?"),
    ("People and Society", "Languages", "", "Which languages are spoken in {}?"),
    ("People and Society", "Population", "", "How many people live in {}?"),
    ("Economy", "Industries", "", "What are the main industries of {}?"),
    ("Economy", "Exports - commodities", "", "What does {} export?"),
    ("Introduction", "Background", "", "Tell me about the history of {}."),
    ("Economy", "Economy - overview", "", "How is the economy of {} doing?"),
)


def facts(folder: Path) -> list[Document]:
    """Questions on a country, three or four in a row; sometimes the answers are wanted as JSON."""
    found = []
    for path, text in texts(p.FACTBOOK, folder, "package/*/??.json"):
        country = json.loads(text)
        name, chance = country_name(country), random.Random(path)
        if not name or "/meta/" in path:
            continue
        known = [(ask.format(name), answer) for *keys, ask in FACTS if (answer := _fact(country, *keys))]
        if len(known) >= 4 and chance.random() < 0.8:
            found.append(dialogue([turn for pair in chance.sample(known, 4) for turn in pair]))
        elif known:
            entries = {keys[1]: answer for *keys, _ in FACTS[:9] if (answer := _fact(country, *keys))}
            answer = f"```json\n{json.dumps({'name': name, **entries}, indent=2, ensure_ascii=False)}\n```"
            found.append(dialogue([f"Give me the main facts about {name} as JSON.", answer]))
    return found


def _fact(country: dict[str, Any], *keys: str) -> str | None:
    for key in keys:
        country = country.get(key, {}) if key else country
    text = country.get("text")
    if not text or len(text) > 2500:
        return None
    text = text.replace(" ++ ", "; ")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")", "!")) else ".")
