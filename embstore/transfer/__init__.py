"""What is in the database as files, and files into the database.

    table       what is carried: facts about it, and batches of columns
    export      the database as a table                 load, load_results    a table into the database
    parquet, npz, csvs, kaldi, pickles                  a table as files, and files as a table
    files       names, files that appear whole, folders that are an export's
    opened      which of the formats a path holds
    checked     what of a table may come in             origin                by which model it was made
    unpickle    arrays and built-ins out of a pickle    decimals              float32 out of decimal numbers

Writers and readers know nothing of the database; everything streams, in batches of about 20 MB.
"""
