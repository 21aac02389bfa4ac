DROP TABLE stream_progress;
