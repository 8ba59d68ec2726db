"""Search that finds English words and, in runs of Chinese characters, every pair of neighbours."""
import re

from sphinx.search.en import SearchEnglish

HAN = r"\u3400-\u9fff\uf900-\ufaff"


class EnglishAndChinese(SearchEnglish):
    """English words as Sphinx indexes them; Chinese as overlapping pairs (and single characters)."""

    lang = "en+zh"
    _pieces = re.compile(rf"[{HAN}]+|[^\W{HAN}]+")

    def split(self, input: str) -> list[str]:
        words = []
        for piece in self._pieces.findall(input):
            if re.match(rf"[{HAN}]", piece):
                words += [*piece, *(piece[i:i + 2] for i in range(len(piece) - 1))]
            else:
                words.append(piece)
        return words

    # A query is cut in the same way, but a single character counts only if it stands alone.
    js_splitter_code = r"""
var splitQuery = (query) =>
  (query.match(/[HAN]+|(?:(?![HAN])[\p{L}\p{N}_])+/gu) || []).flatMap((piece) =>
    /[HAN]/u.test(piece) && piece.length > 1
      ? Array.from({ length: piece.length - 1 }, (_, i) => piece.slice(i, i + 2))
      : [piece]);
""".replace("HAN", HAN)
