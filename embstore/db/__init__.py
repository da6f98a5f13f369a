"""The database: tables, connections, the embedded server, migrations."""
