"""The report, and its output as text, HTML, Markdown and JSON."""
