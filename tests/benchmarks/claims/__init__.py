"""Numbers that the source documents claim, measured here: results/claims.md, made by `make claims`.

    claim.py       Claim and Finding, and the list of all claims
    page.py        results/claims/C07.json of each claim, and the table results/claims.md made from these files
    c07.py ...     a file for each claim; a new file needs no other line
    subjects.py    models and batches that several claims use

A claim's file holds the sentence, the result that would refute it (written down before the first run), a function that
measures, and a function that computes the verdict from the numbers. c07.py is the model for the others.
"""
