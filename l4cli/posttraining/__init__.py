"""What a teacher says becomes rows and soft targets here; rollouts and judges are not built yet."""
