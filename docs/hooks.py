"""Parts of the site that are made while it is built, from the registry of methods, the package and the recipes.

mkdocs calls the functions `on_...`. A method's page is `docs/methods/NAME.md`, if there is one, between parts that its
docstrings, its signature, the published runs and the measured tables give.
"""

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

from hfkd import DataArguments, DistillationConfig, ModelArguments
from hfkd.losses import LOSSES
from hfkd.losses.regions import CITATION as REGIONS
from hfkd.losses.standardize import CITATION as ZSCORE
from hfkd.runs.published import published_runs

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"
MODIFIERS = {"zscore": ZSCORE, "regions": REGIONS}  # pages of what is set over a method, and their papers
HANDWRITTEN = ("## When to take it", "## Faults of the release")  # sections of docs/methods/NAME.md
FROM_ELSEWHERE = {  # pages of the site whose text lies outside docs/
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "measured.md": "recipes/README.md",
    "imagenet.md": "recipes/imagenet/README.md",
}
KEYS = (ModelArguments, DataArguments, DistillationConfig)


def on_config(config):
    methods = next(entry["Methods"] for entry in config.nav if "Methods" in entry)
    methods += [
        {"Z-score": "methods/zscore.md"},
        {"SDD": "methods/regions.md"},
        *({title(name): f"methods/{name}.md"} for name in LOSSES),
    ]
    return config


def on_files(files, config):
    """Add the pages that have no file in docs/, and leave out texts on methods that the registry does not have."""
    for page, source in FROM_ELSEWHERE.items():
        files.append(File.generated(config, page, content=with_links_of_the_site(source)))
    files.append(File.generated(config, "keys.md", content=keys_page()))
    files.append(File.generated(config, "notebook.md", content=notebook_page()))
    for name in missing_texts():
        files.append(File.generated(config, f"methods/{name}.md", content=""))
    for path in METHODS.glob("*.md"):
        if path.stem not in (*LOSSES, *MODIFIERS, "index"):
            files.remove(files.get_file_from_path(f"methods/{path.name}"))
    return files


def on_page_markdown(markdown, page, config, files):
    path = Path(page.file.src_uri)
    if path.parent.name != "methods":
        return markdown
    if path.stem in LOSSES:
        return method_page(path.stem, markdown)
    for name, citation in MODIFIERS.items():
        markdown = markdown.replace(f"<!-- the paper of {name} -->", f"{paper(citation)}.")
        markdown = markdown.replace(f"<!-- the citation of {name} -->", bibtex(citation))
    return markdown.replace("<!-- the table of methods -->", methods_table())


def missing_texts():
    """Return the methods without a file in docs/methods."""
    return [name for name in LOSSES if not (METHODS / f"{name}.md").is_file()]


def title(name):
    """Return the name of a method in prose, which its file's docstring begins with."""
    return module(name).__doc__.partition(":")[0]


def module(name):
    return sys.modules[LOSSES[name].__module__]


def method_page(name, text):
    """Return the page of a method: idea, formula, the text of docs/methods, parameters, rows, citation, API."""
    idea = paragraphs(module(name).__doc__)[0].partition(": ")[2]
    more, *sections = re.split(r"(?m)^(?=## )", text)
    parts = [f"# {title(name)}", idea[0].upper() + idea[1:], more, paper(LOSSES[name].citation) + "."]
    parts += ["## Formula", *map(formula, functions(name)), *sections]
    parts += ["## In a recipe", recipe_block(name), facts(name)]
    parts += rows_of(name)
    parts += ["## Citation", bibtex(LOSSES[name].citation), "## API", f"::: {LOSSES[name].__module__}"]
    return "\n\n".join(part.strip("\n") for part in parts)


def functions(name):
    """Return the pure functions that compute a method's loss: those that its package publishes."""
    public = vars(sys.modules["hfkd.losses"])
    return [
        value
        for value in vars(module(name)).values()
        if inspect.isfunction(value) and value.__module__ == module(name).__name__ and value.__name__ in public
    ]


def formula(function):
    """Return the description of a loss, without the sections on its arguments."""
    first, *rest = paragraphs(inspect.getdoc(function).partition("\nArgs:")[0])
    return "\n\n".join([f"`{function.__name__}`: {escaped(first)}", *map(escaped, rest)])


def paragraphs(text):
    return [part for part in inspect.cleandoc(text).split("\n\n") if part.strip()]


def escaped(paragraph):
    """Return a paragraph of a docstring as Markdown; an indented one is code already."""
    for plain, sign in (("^2", "²"), (" * ", " · ")):
        paragraph = paragraph.replace(plain, sign)
    return paragraph if paragraph.startswith("    ") else re.sub(r"([*|])", r"\\\1", paragraph).replace("<", "&lt;")


def arguments(name):
    return inspect.signature(LOSSES[name]).parameters.values()


def default(parameter):
    return "" if parameter.default is parameter.empty else json.dumps(parameter.default)


def recipe_block(name):
    lines = [f"    {each.name}: {default(each) or '[...]'}" for each in arguments(name)]
    described = argument_texts(LOSSES[name])
    rows = [[f"`{each.name}`", described.get(each.name, "")] for each in arguments(name)]
    block = "\n".join(["```yaml", "losses:", f"  {name}:", *lines, "```"])
    return f"With the default of every parameter:\n\n{block}\n\n{table(['parameter', ''], rows)}"


def argument_texts(loss):
    """Return {parameter: text} of the section Args of a docstring."""
    section = inspect.getdoc(loss).partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"(?ms)^    ([\w, ]+): (.*?)(?=^    \w|\Z)", section + "\n")
    return {name: escaped(" ".join(text.split())) for names, text in entries for name in names.split(", ")}


def facts(name):
    """Return what a method reads and what it cannot be used with, as its class says."""
    loss = LOSSES[name]
    facts = [f"Reads {reads(loss)}."]
    if loss.views > 1:
        facts.append("Both networks see two views of each image.")
    if not loss.takes_mixed_labels:
        without = " without `dominant_label`" if "dominant_label" in inspect.signature(loss).parameters else ""
        facts.append(f"Needs one class for each image: no mixup or CutMix{without}.")
    if loss.needs_index:
        facts.append("Needs row numbers of the images: no `streaming`.")
    return " ".join(facts)


def reads(loss):
    parts = {
        "the logits": loss.reads_logits or loss.reads_raw_logits,
        "maps": "student_layers" in inspect.signature(loss).parameters or "averaged_map" in (loss.student_layers or ()),
        "embeddings": "embedding" in (loss.student_layers or ()),
        "the map in front of the classifier": "projector" in (loss.student_layers or ()),
    }
    return " and ".join(part for part, is_read in parts.items() if is_read)


def methods_table():
    rows = [
        [f"[`{name}`]({name}.md)", paper(loss.citation), ", ".join(f"`{each.name}`" for each in arguments(name))]
        for name, loss in LOSSES.items()
    ]
    rows.append(["[`logit_standardization: true`](zscore.md)", paper(ZSCORE), "over every logit loss"])
    rows.append(["[`regions: [1, 2, 4]`](regions.md)", paper(REGIONS), "of the logit methods that have it"])
    return table(["`losses`", "paper", "parameters"], rows)


def rows_of(name):
    return [*published_rows(name), *measured_rows(name)]


def published_rows(name):
    """Return the table of published values of a method, with and without Z-score; nothing where there are none."""
    runs = {recipe: run for recipe, run in published_runs().items() if method_of(run) == name}
    rows = [[f"`{recipe}`", f"{run.top1:.2f}"] for recipe, run in runs.items()]
    text = "Top-1 in the paper named in the recipe; `hfkd reproduce` repeats these runs."
    return ["## Published", text, table(["recipe", "top-1"], rows)] if rows else []


def method_of(run):
    """Return the last of a published run's losses: a feature method stands behind the KD that it is added to."""
    return list(run.settings.get("losses") or [None])[-1]


def measured_rows(name):
    """Return the rows of a method in the measured tables of recipes/README.md, beside those of KD."""
    parts = []
    for section in re.split(r"(?m)^## Measured: ", (ROOT / "recipes" / "README.md").read_text())[1:]:
        heading = section.partition("\n")[0]
        for block in re.findall(r"(?m)(?:^\|.*\n)+", section):
            header, _, *rows = block.splitlines()
            if re.match(r"\| (student|recipe|method) \|", header):
                ours = [row for row in rows if method_in(row) == title(name).lower()]
                others = [row for row in rows if method_in(row) == "kd" and row not in ours]
                if ours:
                    rule = re.sub(r"[^|]+", "---", header)
                    lines = "\n".join([header, rule, *others, *ours])
                    parts.append(f"[{heading[0].upper()}{heading[1:]}](../measured.md#{slug(heading)}):\n\n{lines}")
    return ["## Measured", *parts] if parts else []


def method_in(row):
    """Return the method that a row such as `| KD + FitNet | ...` measures, in lower case."""
    words = re.sub(r"\(.*?\)|,.*", "", row.split("|")[1]).replace("+ Z-score", "")
    return words.removeprefix(" KD + ").strip().lower()


def slug(heading):
    """Return the anchor that mkdocs gives the section of a measurement."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", f"Measured: {heading}").strip().lower())


def paper(citation):
    """Return "Hinton et al., Distilling the Knowledge in a Neural Network, 2015" from a BibTeX entry."""
    fields = {key: " ".join(text.split()) for key, text in re.findall(r"(\w+) = \{(.*?)\},\n", citation, re.DOTALL)}
    families = [author.partition(",")[0] for author in fields["author"].split(" and ")]
    authors = " and ".join(families) if len(families) < 3 else f"{families[0]} et al."
    acronyms = re.findall(r"\w*[A-Z]{3}\w*", fields.get("booktitle", ""))  # of which the last is the conference's
    where = " ".join([*acronyms[-1:], fields["year"]])
    name = re.sub(r"[{}$\\]", "", fields["title"])
    return f"{authors}, {name}, {where}"


def bibtex(citation):
    return f"```bibtex\n{inspect.cleandoc(citation)}\n```"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_links_of_the_site(source):
    """Return the text of a file outside docs/, with links to files replaced by links to pages."""
    pages = {ROOT / path: page for page, path in FROM_ELSEWHERE.items()} | {ROOT / "docs/digits.ipynb": "notebook.md"}

    def replaced(match):
        path = (ROOT / source).parent.joinpath(match[1]).resolve()
        inside = path.relative_to(ROOT / "docs") if path.is_relative_to(ROOT / "docs") else path
        return f"]({pages.get(path, inside)}"

    return re.sub(r"\]\((?!https?:|#)([^)#]+)", replaced, (ROOT / source).read_text())


def keys_page():
    """Return the table of hfkd's keys of a recipe, with defaults and help."""
    parts = [
        "# Keys of a recipe",
        "A recipe may also set every field of transformers' `TrainingArguments`; `hfkd distill --help-all` lists them. "
        "On the command line a key is `--key value`.",
    ]
    for group in KEYS:
        rows = [[f"`{each.name}`", shown(each), cell(each.metadata["help"])] for each in documented(group)]
        parts += [f"## {group._argument_group_name.capitalize()}", table(["key", "default", ""], rows)]
    return "\n\n".join(parts)


def documented(group):
    """Return the fields of a class of arguments that it defines itself, and not transformers."""
    own = [field for field in dataclasses.fields(group) if field.name in group.__dict__["__annotations__"]]
    return [field for field in own if field.metadata.get("help")]


def shown(field):
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "" if value in (None, dataclasses.MISSING) else f"`{json.dumps(value)}`"


def cell(text):
    return text.replace("|", "\\|").replace("<", "&lt;")


def notebook_page():
    """Return docs/digits.ipynb with its stored outputs as Markdown."""
    cells = json.loads((ROOT / "docs" / "digits.ipynb").read_text())["cells"]
    return "\n\n".join(part for each in cells for part in cell_parts(each))


def cell_parts(cell):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        parts.append(f"```text\n{text.rstrip()}\n```")
    return parts
