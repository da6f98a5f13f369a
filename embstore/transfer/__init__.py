"""What is in the database as files.

    table       what is carried: facts about it, and batches of columns
    export      the database as a table
    parquet, npz, csvs, kaldi, pickles      a table as files
    files       names, files that appear whole, folders that are an export's

The writers know nothing of the database; everything streams, in batches of about 20 MB.
"""
