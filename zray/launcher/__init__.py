"""`zray-cluster`: brings a cluster up on hosts that can be reached by ssh, and down again.

    cli.py                      arguments and exit codes
    config.py yaml_text.py hostlist.py   the file: text -> checked records, errors with line and key (pure)
    facts.py plan.py rows.py    what hosts say, what is to be done next, how it is shown (pure)
    ssh.py                      the door: one conversation with one host over the system's ssh
    running.py                  obeys the plans on all hosts at once; jobs.py the same for commands, jobs and logs
    transfer.py                 files to and from hosts by rsync
    templates.py                recipes for Slurm and Kubernetes
    remote/                     the program that runs on the hosts: the standard library only, sent over ssh, left nowhere

Needs the extra `cluster` (PyYAML). Not imported by `import zray`.
"""
