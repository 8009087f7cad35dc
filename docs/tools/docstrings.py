"""What the docstrings of the house need before they are Markdown: equations, and examples that are doctests."""

import html
import re

import griffe
from latex2mathml.converter import convert

SECTION = re.compile(r"\n+(Args|Attributes|Returns|Yields|Raises|References|Examples?):\n")
EQUATION = re.compile(r"^( *)\.\. math::(.*\n(?:\1 +\S.*\n|\n(?=\1 +\S))*)", re.MULTILINE)


def mathml(tex: str) -> str:
    """An equation as MathML, which browsers draw by themselves.

    Args:
      tex: in LaTeX.

    Returns:
      One line of HTML, with the source for those who read or copy it.
    """
    tex = " ".join(tex.split()).replace(r"\arg\max", r"\operatorname{argmax}")
    drawn = convert(tex, display="block").replace("\n", " ")
    return f'<div class="equation" title="{html.escape(tex)}">{drawn}</div>'


def as_markdown(docstring: str) -> str:
    """A docstring of the house as the google style that griffe reads.

    Args:
      docstring: without its indentation.

    Returns:
      The same with MathML for `.. math::`, and examples as doctests.
    """
    text = EQUATION.sub(lambda found: f"\n{mathml(found[2])}\n\n", docstring + "\n").rstrip()
    text = SECTION.sub(lambda found: f"\n\n{found[1]}:\n", text)  # griffe wants a blank line before each
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called by griffe for every module, class, function and attribute.

        Args:
          obj: of griffe.
          **kwargs: not used.
        """
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
