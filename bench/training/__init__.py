"""What a method trains with: runs, learners, batches, networks, checkpoints, students, the teacher's meter."""
