"""Number chapters as their files are: notebooks/06_uniform_quantizer is chapter 6.

Sphinx counts the pages it finds. While some chapters are not written yet, and so that a number in
print stays right for ever, the number comes from the file's name. Sections, figures, equations,
theorems and exercises take theirs from it.
"""

import re

from docutils import nodes
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles

CHAPTER = re.compile(r"notebooks/(\d\d)_\w+")


def renumber(env, docname, chapter):
    sections = env.toc_secnumbers[docname]
    for anchor, number in sections.items():
        if number:
            sections[anchor] = (chapter, *number[1:])
    entries = [*env.tocs[docname].findall(nodes.reference), env.titles[docname]]
    for entry in entries:
        if entry.get("secnumber"):
            entry["secnumber"] = [chapter, *entry["secnumber"][1:]]


def setup(app):
    count = TocTreeCollectorWithStyles.assign_section_numbers

    def assign_section_numbers(self, env):
        before = env.toc_secnumbers
        count(self, env)
        for docname in env.toc_secnumbers:
            if match := CHAPTER.fullmatch(docname):
                renumber(env, docname, int(match[1]))
        return [doc for doc, numbers in env.toc_secnumbers.items() if numbers != before.get(doc)]

    TocTreeCollectorWithStyles.assign_section_numbers = assign_section_numbers
    return {"parallel_read_safe": True, "parallel_write_safe": True}
