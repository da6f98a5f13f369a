"""What is in the database as files, and files into the database.

    table       what is carried: facts about it, and batches of columns
    export      the database as a table                 load       a table into the database, read twice
    parquet, npz, csvs, kaldi, pickles                  a table as files; all but the last, files as a table
    files       names, files that appear whole, folders that are an export's
    reading     what readers share                      opened     which of the formats a path holds
    trees       pickles as a table                      unpickle   nothing but arrays and built-ins out of pickles
    ark         Kaldi archives                          decimals   float32 out of decimal numbers
    checked     what of a table may come in             origin     which dataset and which model it is of
    incoming    a part of it into the tables, in one transaction

Writers and readers know nothing of the database; everything streams, in batches of about 20 MB.
"""
