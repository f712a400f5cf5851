"""Texts in other languages than English."""

import json
import re
from itertools import pairwise
from pathlib import Path

from bench.general import packages as p
from bench.general.cleaning import joined, tidy
from bench.general.documents import LONG, Document, is_clean, is_english, texts_of
from bench.general.english import handbook_pages
from bench.general.packages import texts


def handbook_in(folder: Path, language: str) -> list[Document]:
    """Pages of the Debian handbook in a language, where most paragraphs are translated; those left in English are dropped."""
    english = {block for page in handbook_pages(folder, "en-US").values() for block in page}
    found = []
    for page in handbook_pages(folder, language).values():
        foreign = [block.startswith("```") or not (block in english or is_english(block)) for block in page]
        own = [block for block, kept in zip(page, foreign, strict=True) if kept]
        words, all_words = (sum(not b.startswith("```") for b in blocks) for blocks in (own, page))
        if words > 0.6 * all_words and is_clean(joined(own)):
            found += texts_of("technical", joined(own), language=language.split("-")[0], most=4500, least=250)
    return found


def call_to_arms(folder: Path) -> list[Document]:
    """Lu Xun's stories, without the notes of a later edition that follow each; a line of dashes stands below every title."""
    ((_, text),) = texts(p.WORDCLOUD, folder, "*/wc_cn/CalltoArms.txt")
    lines = [line.replace("\u3000", " ").strip() for line in text[: text.index("<!--")].splitlines()]
    lines = [line for line in lines if line and "分节阅读" not in line]
    found = []
    parts = re.split(r"\n-{5,}", "\n".join(lines))
    for before, part in pairwise(parts):
        title, story = before.splitlines()[-1], re.split(r"\n[□ ]*注释", part)[0]
        story = story if story != part else part.rpartition("\n")[0]
        words = re.sub(r"（[①-⒛]）|[①-⒛]", "", "\n\n".join([f"# {title}", *story.strip().splitlines()]))
        found += texts_of("literature", words, language="zh", most=3000, least=300)
    return found


def classics(folder: Path) -> list[Document]:
    """Essays of Guwen Guanzhi, the Analects, poems of Tang and Song, lives of poets."""
    found = []
    ((_, text),) = texts(p.CHINESE_POETRY, folder, "package/dist/mengxue/guwenguanzhi.json")
    for volume in json.loads(text)["content"]:
        for essay in volume["content"]:
            words = "\n\n".join([f"# {essay['chapter']}", essay["author"].strip(), *essay["paragraphs"]])
            found += texts_of("literature", tidy(words), language="zh", most=2500, least=250)
    ((_, text),) = texts(p.CHINESE_POETRY, folder, "package/dist/lunyu/lunyu.json")
    for chapter in json.loads(text):
        found += texts_of(
            "literature", "\n\n".join([f"# {chapter['chapter']}", *chapter["paragraphs"]]), language="zh", most=2000
        )
    return found + _poems(folder)


def _poems(folder: Path) -> list[Document]:
    found = []
    ((_, text),) = texts(p.CHINESE_POETRY, folder, "package/dist/mengxue/tangshisanbaishou.json")
    poems = [poem for form in json.loads(text)["content"] for poem in form["content"]]
    for i in range(0, len(poems), 8):
        verses = ["\n".join([f"《{x['chapter']}》{x['author']}", *x["paragraphs"]]) for x in poems[i : i + 8]]
        found += texts_of("literature", tidy("\n\n".join(verses)), language="zh", most=LONG, least=200)
    return found
