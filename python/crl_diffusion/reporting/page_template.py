"""The frame of the report's page: its head, its style for screens, phones and paper. `$title` and `$body` come in."""

from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: #1a1a1a; font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid #ccc; }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
a { color: #0072b2; }
nav ul { columns: 2 18rem; padding-left: 1.2rem; margin: .5rem 0; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .25rem 0; }
caption, figcaption { text-align: left; caption-side: bottom; color: #444; font-size: .86rem; padding-top: .5rem; }
figcaption, .note { max-width: 52rem; }
.note { color: #444; font-size: .86rem; margin: .4rem 0 1rem; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e4e4;
  white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4.5rem; border-bottom: 1px solid #555; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
td:first-child { white-space: normal; min-width: 10rem; max-width: 20rem; font-weight: 500; }
.text td { white-space: normal; overflow-wrap: anywhere; max-width: 34rem; }
td small { color: #555; font-size: .92em; }
tr.baseline td { background: #f4f4f4; }
figure { margin: 1rem 0 1.75rem; }
img { display: block; max-width: 100%; height: auto; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: #0072b2; overflow-wrap: anywhere; }
pre { background: #f6f6f6; padding: .7rem .9rem; font-size: .82rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.warning { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .5rem 1rem; margin: 1rem 0; }
@media (max-width: 700px) { main { padding: .75rem .8rem 3rem; } figure img { max-width: 680px; }
  td:first-child { min-width: 7rem; max-width: 9rem; } }
@media print { body { font-size: 10pt; } main { max-width: none; padding: 0; } .scroll { overflow: visible; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } table { font-size: 7.5pt; }
  th, td { white-space: normal; padding: .2rem .35rem; min-width: 0; } td:first-child { min-width: 5rem; } }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")
