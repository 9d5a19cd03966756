"""Reports of findings: terminal text, HTML, Markdown, JSON, charts, notebook, Perfetto trace."""
