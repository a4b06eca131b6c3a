"""How the book is made: run the chapters, collect what they claim, stage the pages, build the site."""
