"""The page in the browser: clips, tunings, edits and their queue. Imports no torch.

app.py       addresses of the page
server.py    the server
security.py  hosts, origins, token, sizes of requests, headers of answers
forms.py     form fields, from the settings' descriptions and bounds
clips.py     uploaded and bundled clips
decode.py    the process that decodes uploaded files, under limits
runs.py      run folders below the root
queue.py     requested jobs, in SQLite
worker.py    the process that runs jobs, one for each device
workers.py   supervision of the workers
events.py    events for the browsers
"""
