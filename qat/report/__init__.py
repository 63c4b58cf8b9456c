"""Self-contained HTML pages: charts, tables, and the report on a run."""
