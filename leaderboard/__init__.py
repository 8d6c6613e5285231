"""Records in, boards out: tables, ranks, a static site. Needs no torch."""
