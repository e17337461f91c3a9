"""Who may run a VM, kept by a third party (etcd): fulfils `engine.arbiter_port`."""
