"""What the workbook remembers and shows: rows, tables, the figures' style, provenance, paths, pages to share."""
