"""What several commands share: their options and files, how times and memory are taken, and what is measured."""
