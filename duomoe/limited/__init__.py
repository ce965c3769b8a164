"""Work for strangers, in processes of its own, within limits of time and memory and without files or network."""
