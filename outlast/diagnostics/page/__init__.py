"""The report's page while the job runs, served over HTTP to whoever has the token."""
