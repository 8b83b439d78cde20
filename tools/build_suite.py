"""Writes the suite: which mteb tasks, splits and subsets make up our benchmarks.

    python build_suite.py figure2.json per_language.json suite.json --counts counts.md

From the installed mteb's metadata and the two lists of the paper; no data set is loaded, the output depends on
nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mteb

# Our code -> ISO 639-3 codes (individual and macro) and the scripts the language is scored in.
LANGUAGES = {
    "en": ("eng", "Latn"),
    "es": ("spa", "Latn"),
    "ru": ("rus", "Cyrl"),
    "fr": ("fra", "Latn"),
    "vi": ("vie", "Latn"),
    "fa": ("fas pes", "Arab"),
    "id": ("ind", "Latn"),
    "ar": ("ara arb", "Arab"),  # Standard Arabic only; no dialect
    "fi": ("fin", "Latn"),
    "ko": ("kor", "Hang Kore"),
    "hi": ("hin", "Deva"),
    "bn": ("ben", "Beng"),
    "te": ("tel", "Telu"),
    "sw": ("swa swh", "Latn"),
}
CODES = {
    f"{code}-{script}": name
    for name, (codes, scripts) in LANGUAGES.items()
    for code in codes.split()
    for script in scripts.split()
}
# The published evaluation scores one split a task: the first of these that the task has.
SPLITS = ("test", "test.full", "test_expert", "validation", "dev", "train")
# Published name -> the version the published cross-lingual evaluation runs.
CROSS_LINGUAL = {
    "MLQARetrieval": "MLQARetrieval",
    "BelebeleRetrieval": "BelebeleRetrieval",
    "STS17": "STS17",
    "STS22": "STS22.v2",
    "IndicCrosslingualSTS": "IndicCrosslingualSTS",
}
BITEXT = ("Tatoeba", "NTREXBitextMining", "FloresBitextMining", "BibleNLPBitextMining")
ENGLISH = "eng-Latn"
PIVOT_FREE = {"FloresBitextMining": 40, "NTREXBitextMining": 20}

# Individual code -> the macrolanguage code that another set uses for the same language.
MACRO = {
    "als": "sqi",
    "arb": "ara",
    "azj": "aze",
    "gaz": "orm",
    "khk": "mon",
    "kmr": "kur",
    "lvs": "lav",
    "npi": "nep",
    "pbt": "pus",
    "pes": "fas",
    "plt": "mlg",
    "swh": "swa",
    "uzn": "uzb",
    "ydd": "yid",
    "zsm": "msa",
    "cmn": "zho",
    "fil": "tgl",
    "twi": "aka",
}
# Families that mteb's table lacks or places at another depth than its neighbours.
FAMILIES = {
    "aze": "Turkic",
    "bos": "Balto-Slavic",
    "eus": "Basque",
    "hmn": "Hmong-Mien",
    "hrv": "Balto-Slavic",
    "lvs": "Balto-Slavic",
    "mlg": "Austronesian",
    "mon": "Mongolic-Khitan",
    "msa": "Austronesian",
    "nep": "Indo-Iranian",
    "nno": "Germanic",
    "nob": "Germanic",
    "orm": "Afro-Asiatic",
    "pus": "Indo-Iranian",
    "sqi": "Albanian",
    "srp": "Balto-Slavic",
    "uzb": "Turkic",
    "zho": "Sino-Tibetan",
}

PAPER = """## Against the paper

- The paper says 123 datasets: its Figure 2 has 123 boxes with STS13 twice, so 122 names; we have all 122.
- The paper gives no count per language that we know of. "Published list" is what its evaluation code averages per
  language: 133 names, which are Figure 2's 122 (four of them as ".v2", one of those beside the plain one) and ten
  more that the figure does not draw and that we leave out. They matter for fr (7 of 32), vi (2 of 12), bn (1 of 12).
- ru, fa, id, ar, fi, te and sw have exactly the published list.
- The published code does not filter exclusively, so its MLQARetrieval, BelebeleRetrieval, STS17 and STS22 scores of a
  language also average cross-lingual subsets; ours do not.
"""

Json = dict[str, Any]


def subsets_of(name: str) -> dict[str, list[str]]:
    """Subset -> its language-script codes, in mteb's order."""
    return dict(mteb.get_task(name).metadata.hf_subsets_to_langscripts)


def header(name: str) -> Json:
    """The keys all entries share."""
    metadata = mteb.get_task(name).metadata
    split = next((split for split in SPLITS if split in metadata.eval_splits), metadata.eval_splits[0])
    return {"name": name, "type": metadata.type, "revision": metadata.revision, "splits": [split]}


def monolingual(name: str, wanted: Iterable[str]) -> dict[str, str]:
    """Subset -> language, for the subsets whose score counts for one of the wanted languages.

    A subset counts if all its text is in that language. A language with no such subset takes its pairs with
    English instead: the paper scores STS17 in French and IndicCrosslingualSTS in Hindi, Bengali and Telugu.
    """
    spoken = {subset: {CODES.get(code) for code in codes} for subset, codes in subsets_of(name).items()}
    found = {}
    for language in wanted:
        own = [subset for subset, both in spoken.items() if both == {language}]
        own = own or [subset for subset, both in spoken.items() if both == {language, "en"}]
        if not own:
            raise ValueError(f"{name} has no subset for {language}")
        found.update(dict.fromkeys(own, language))
    return {subset: found[subset] for subset in spoken if subset in found}


def main_suite(figure: Json, languages: Json) -> tuple[list[Json], Json, Json]:
    """The tasks of LUSIFER, the published names that stand for another mteb name, and what the figure leaves out."""
    listed: dict[str, list[str]] = defaultdict(list)
    for language in LANGUAGES:
        for name in languages[language]:
            listed[name].append(language)
    tasks, renamed = [], {}
    for group, names in figure.items():
        for published in sorted(set(names), key=str.lower):
            # The figure drops the ".v2" that the evaluation code has; STS22 is in both versions there.
            pinned = [name for name in (published, published + ".v2") if name in listed]
            if not pinned:
                raise ValueError(f"no language has {published}")
            if pinned != [published]:
                renamed[published] = pinned
            for name in pinned:
                entry = header(name)
                subsets = monolingual(name, listed.pop(name))
                tasks.append({"name": name, "published_name": published, "group": group, **entry, "subsets": subsets})
    return tasks, renamed, dict(sorted(listed.items()))


def cross_lingual_suite() -> list[Json]:
    """The tasks of LUSIFER-xling; subset -> [query language, document language]."""
    tasks = []
    for published, name in CROSS_LINGUAL.items():
        entry = header(name)
        # mteb names retrieval subsets document first, query second (Belebele's loader and MLQA's text statistics).
        order = -1 if entry["type"] == "Retrieval" else 1
        pairs = {
            subset: codes[::order]
            for subset, codes in subsets_of(name).items()
            if len({code.split("-")[0] for code in codes}) == 2
        }
        tasks.append({"name": name, "published_name": published, **entry, "subsets": pairs})
    return tasks


def bitext_suite() -> list[Json]:
    """The tasks of LUSIFER-100: every language into English, and the sample without English."""
    all_pairs = {name: subsets_of(name) for name in BITEXT}
    well_covered = {macro(codes[0]) for name in ("Tatoeba", "NTREXBitextMining") for codes in all_pairs[name].values()}
    tasks = []
    for name, pairs in all_pairs.items():
        entry = header(name)
        entry["subsets"] = sorted(subset for subset, codes in pairs.items() if codes[1] == ENGLISH != codes[0])
        if name in PIVOT_FREE:
            others = {
                subset: (codes[0], codes[1])
                for subset, codes in pairs.items()
                if ENGLISH not in codes and all(macro(code) in well_covered for code in codes)
            }
            entry["pivot_free"] = pivot_free(others, PIVOT_FREE[name])
        tasks.append(entry)
    return tasks


def macro(code: str) -> str:
    """The language of a language-script code, macrolanguages and their members being one."""
    language = code.split("-")[0]
    return MACRO.get(language, language)


_LEVELS: dict[str, dict[str, str]] = json.loads((files("mteb.languages") / "language_family.json").read_text())


def family(code: str) -> str:
    """Family of a language-script code; for Indo-European, its branch."""
    language = code.split("-")[0]
    levels = _LEVELS.get(language, {})
    top = levels.get("level0", language)
    return FAMILIES.get(language) or (levels.get("level2", top) if top == "Indo-European" else top)


def pivot_free(pairs: Mapping[str, tuple[str, str]], count: int) -> list[str]:
    """A fixed sample of pairs, no language twice, both languages of different family and script.

    Goes round the (family, script) cells, one language of each a round, and gives each language the partner
    whose subset name hashes lowest.
    """
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    for code in sorted({code for pair in pairs.values() for code in pair}, key=_hash):
        cells[family(code), code.split("-")[1]].append(code)
    rounds = zip_longest(*(cells[cell] for cell in sorted(cells)))
    partners: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for subset in sorted(pairs, key=_hash):
        source, target = pairs[subset]
        if family(source) != family(target) and source.split("-")[1] != target.split("-")[1]:
            partners[source].append((subset, target))
    used: set[str] = set()
    sample: list[str] = []
    for source in (code for row in rounds for code in row if code):
        subset, target = next(((s, t) for s, t in partners[source] if macro(t) not in used), ("", ""))
        if macro(source) not in used and subset and len(sample) < count:
            used |= {macro(source), macro(target)}
            sample.append(subset)
    return sorted(sample)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def dumps(value: Json) -> str:
    """JSON with one task a line; lists of subsets are wrapped."""

    def compact(item: Any) -> str:
        return json.dumps(item, ensure_ascii=False)

    def task(entry: Json) -> str:
        if not isinstance(entry["subsets"], list):
            return f"   {compact(entry)}"
        plain = compact({key: item for key, item in entry.items() if not isinstance(item, list) or key == "splits"})
        lists = [(key, entry[key]) for key in ("subsets", "pivot_free") if key in entry]
        wrapper = textwrap.TextWrapper(118, " " * 5, " " * 5, break_long_words=False, break_on_hyphens=False)
        wrapped = [f'"{key}": [\n{wrapper.fill(compact(items)[1:-1])}\n    ]' for key, items in lists]
        return f"   {plain[:-1]}, " + ", ".join(wrapped) + "}"

    parts = []
    for key, item in value.items():
        if isinstance(item, dict) and "tasks" in item:
            inner = [f"  {compact(name)}: {compact(other)}" for name, other in item.items() if name != "tasks"]
            inner.append('  "tasks": [\n' + ",\n".join(task(entry) for entry in item["tasks"]) + "\n  ]")
            parts.append(f" {compact(key)}: {{\n" + ",\n".join(inner) + "\n }")
        elif isinstance(item, dict):
            inner = [f"  {compact(name)}: {compact(other)}" for name, other in item.items()]
            parts.append(f" {compact(key)}: {{\n" + ",\n".join(inner) + "\n }")
        else:
            parts.append(f" {compact(key)}: {compact(item)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def counts(suite: Json, listed: Json) -> str:
    """Datasets per language and group, as Markdown."""
    tasks = suite["LUSIFER"]["tasks"]
    groups = list(dict.fromkeys(task["group"] for task in tasks))
    having = {language: dict.fromkeys(groups, 0) for language in LANGUAGES}
    for entry in tasks:
        for language in set(entry["subsets"].values()):
            having[language][entry["group"]] += 1
    lines = [
        "# Datasets per language",
        "",
        "## LUSIFER",
        "",
        "| language | " + " | ".join(groups) + " | all | published list | left out: not in Figure 2 |",
        "|---|" + "---:|" * (len(groups) + 2) + "---|",
    ]
    left = suite["not_in_figure"]
    for language, row in having.items():
        missing = [name for name, languages in left.items() if language in languages]
        numbers = [*row.values(), sum(row.values()), len(listed[language])]
        lines.append(f"| {language} | " + " | ".join(map(str, numbers)) + f" | {', '.join(missing)} |")
    sums = [sum(row[group] for row in having.values()) for group in groups]
    total = [*sums, sum(sums), sum(len(listed[language]) for language in LANGUAGES)]
    lines.append("| **pairs of task and language** | " + " | ".join(map(str, total)) + " | |")
    names = [len({task["published_name"] for task in tasks if task["group"] == group}) for group in groups]
    distinct = len({name for language in LANGUAGES for name in listed[language]})
    lines.append("| **published names** | " + " | ".join(map(str, [*names, sum(names), distinct])) + " | |")
    rows = [sum(task["group"] == group for task in tasks) for group in groups]
    lines.append("| **mteb tasks** | " + " | ".join(map(str, [*rows, sum(rows), distinct])) + " | |")
    lines += ["", "## LUSIFER-xling", "", "| task | split | pairs |", "|---|---|---:|"]
    xling = suite["LUSIFER-xling"]["tasks"]
    lines += [f"| {task['name']} | {task['splits'][0]} | {len(task['subsets'])} |" for task in xling]
    lines.append(f"| **all** | | {sum(len(task['subsets']) for task in xling)} |")
    lines += [
        "",
        "## LUSIFER-100",
        "",
        "| task | split | into English | languages (ISO 639-3) | pivot-free |",
        "|---|---|---:|---:|---:|",
    ]
    spoken: set[str] = set()
    for task in suite["LUSIFER-100"]["tasks"]:
        codes = {subset.split("-")[0].split("_")[0] for subset in task["subsets"]}
        spoken |= {macro(code) for code in codes}
        figures = f"{len(task['subsets'])} | {len(codes)} | {len(task.get('pivot_free', []))}"
        lines.append(f"| {task['name']} | {task['splits'][0]} | {figures} |")
    bitext = suite["LUSIFER-100"]["tasks"]
    some = {macro(s.split("-")[0].split("_")[0]) for task in bitext[:-1] for s in task["subsets"]}
    into, free = (sum(len(task.get(key, [])) for task in bitext) for key in ("subsets", "pivot_free"))
    lines.append(
        f"| **all** | | {into} | {len(spoken)} ({len(some)} without BibleNLP), macrolanguages merged | {free} |"
    )
    return "\n".join([*lines, "", PAPER])


def main() -> None:
    """Reads the arguments and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure2", type=Path)
    parser.add_argument("per_language", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--counts", type=Path, help="also write the table of counts here")
    arguments = parser.parse_args()
    listed = json.loads(arguments.per_language.read_text())["languages"]
    tasks, renamed, left = main_suite(json.loads(arguments.figure2.read_text())["groups"], listed)
    cross = cross_lingual_suite()
    names = sorted({task["name"] for task in (*tasks, *cross)})
    newer = {name: mteb.get_task(name).metadata.superseded_by for name in names}
    suite = {
        "mteb": version("mteb"),
        "LUSIFER": {"languages": list(LANGUAGES), "tasks": tasks},
        "LUSIFER-xling": {"tasks": cross},
        "LUSIFER-100": {"tasks": bitext_suite()},
        "superseded": {name: other for name, other in newer.items() if other},
        "renamed": renamed,
        "not_in_figure": left,
    }
    text = dumps(suite)
    assert json.loads(text) == suite
    arguments.out.write_text(text, encoding="utf-8")
    if arguments.counts:
        arguments.counts.write_text(counts(suite, listed), encoding="utf-8")


if __name__ == "__main__":
    main()
