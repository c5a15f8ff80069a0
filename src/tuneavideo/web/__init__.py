"""The page in the browser: clips, tunings, edits and their queue. Imports no torch.

app.py       addresses of the page
pages/       addresses of clips and runs, forms, estimates of time and memory
server.py    the server
security.py  hosts, origins, token, sizes of requests, headers of answers
requests.py  forms that are sent, and processes that answer
clips.py     uploaded and bundled clips
decode.py    the process that decodes uploaded files, under limits
captions.py  captions by a model that is on this computer
hub.py       adapters on the hub
runs.py      run folders below the root
queue.py     requested jobs, in SQLite
worker.py    the process that runs jobs, one for each device
workers.py   supervision of the workers
events.py    events for the browsers
"""
