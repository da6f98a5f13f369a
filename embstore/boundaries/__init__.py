"""Where the speaker changes in an ordered set: pure functions on arrays, which know nothing of a database.

    changepoint   method `auto`: penalised change-point detection; no segment size needed
    similarity    method `cosine`: the lowest similarity around each expected place
    mixture       method `gmm`: the same search, judged by Gaussian mixtures
    evaluate      found against true boundaries
    voices        which segments are the same voice coming back
    report        the picture, the JSON and the folders

Every method reads its vectors as an iterator of windows (`result.Windows`) and keeps only a bounded stretch of them.
"""
