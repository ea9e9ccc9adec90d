"""Turns what a run has left into one self-contained HTML page for a person, from plain values and arrays.

render.py                `render`, and the values of the sections on training, search, cost and settings
evaluation_sections.py   the values of the sections on the evaluation
report.html.jinja        layout and texts of the page
report.css               its style, light and dark
svg_charts.py            line charts, reliability diagrams and confusion matrices as SVG
inline_images.py         images, heat maps and attention overlays as PNG data URIs
"""
