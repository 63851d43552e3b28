"""Studies: one file per question, tables in and tables out."""
