#!/usr/bin/env python3
"""Draws what a terminal shows, with its colours (tmux capture-pane -e), as an SVG. The argument is the title."""

import html
import re
import sys

BACKGROUND, FOREGROUND = "#1d1f21", "#c5c8c6"
BASE = ["#282a2e", "#cc6666", "#b5bd68", "#f0c674", "#81a2be", "#b294bb", "#8abeb7", "#c5c8c6"]
BRIGHT = ["#969896", "#d54e53", "#b9ca4a", "#e7c547", "#7aa6da", "#c397d8", "#70c0b1", "#eaeaea"]
WIDTH, HEIGHT, SIZE = 8.4, 18, 14


def indexed(n):
    if n < 8:
        return BASE[n]
    if n < 16:
        return BRIGHT[n - 8]
    if n >= 232:
        return "#" + "%02x" % (8 + 10 * (n - 232)) * 3
    n -= 16
    return "#" + "".join("%02x" % (55 + 40 * part if part else 0) for part in (n // 36, n // 6 % 6, n % 6))


class Style:
    def __init__(self):
        self.fore, self.back, self.bold, self.dim, self.inverse = None, None, False, False, False

    def apply(self, codes):
        codes = [int(code or 0) for code in codes.split(";")]
        while codes:
            code = codes.pop(0)
            if code == 0:
                self.__init__()
            elif code in (1, 2):
                self.bold, self.dim = self.bold or code == 1, self.dim or code == 2
            elif code == 22:
                self.bold = self.dim = False
            elif code in (7, 27):
                self.inverse = code == 7
            elif code in (38, 48) and len(codes) >= 2:
                kind = codes.pop(0)
                colour = indexed(codes.pop(0)) if kind == 5 else "#%02x%02x%02x" % tuple(codes[:3])
                codes = codes if kind == 5 else codes[3:]
                setattr(self, "fore" if code == 38 else "back", colour)
            elif code in (39, 49):
                setattr(self, "fore" if code == 39 else "back", None)
            else:
                for start, colours in ((30, BASE), (90, BRIGHT)):
                    if start <= code < start + 8:
                        self.fore = colours[code - start]
                    elif start + 10 <= code < start + 18:
                        self.back = colours[code - start - 10]

    def colours(self):
        fore, back = self.fore or FOREGROUND, self.back or BACKGROUND
        return (back, fore) if self.inverse else (fore, back)


def pieces(line, style):
    """Runs of one style: column, text, colours, weight and opacity."""
    column = 0
    for part in re.split(r"(\x1b\[[0-9;]*m)", line):
        if part.startswith("\x1b["):
            style.apply(part[2:-1])
        elif part:
            fore, back = style.colours()
            yield column, part, fore, back, style.bold, style.dim
            column += len(part)


def blank(text):
    """Renderers of SVG join spaces, but not these."""
    return html.escape(text).replace(" ", "\u00a0")


def main():
    lines = [re.sub(r"\x1b[()][A-Z0-9]|\x0e|\x0f", "", line) for line in sys.stdin.read().split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    columns = max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines)
    width, height = round(columns * WIDTH + 24), len(lines) * HEIGHT + 52
    title = html.escape(sys.argv[1])
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">')
    print(f"<title>{title}</title>")
    print(f'<rect width="{width}" height="{height}" rx="8" fill="{BACKGROUND}"/>')
    for n, colour in enumerate(("#cc6666", "#f0c674", "#b5bd68")):
        print(f'<circle cx="{18 + 18 * n}" cy="18" r="6" fill="{colour}"/>')
    print(f'<g font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{SIZE}">')
    style = Style()
    for row, line in enumerate(lines):
        top = 36 + row * HEIGHT
        for column, text, fore, back, bold, dim in pieces(line, style):
            x, length = 12 + column * WIDTH, len(text) * WIDTH
            if back != BACKGROUND:
                print(f'<rect x="{x:.1f}" y="{top}" width="{length:.1f}" height="{HEIGHT}" fill="{back}"/>')
            if not text.strip():
                continue
            more = (' font-weight="bold"' if bold else "") + (' opacity="0.6"' if dim else "")
            print(
                f'<text x="{x:.1f}" y="{top + 13}" textLength="{length:.1f}" fill="{fore}"{more}>{blank(text)}</text>'
            )
    print("</g></svg>")


main()
