"""The application: commands, training runs, data sets, reports and the claims of the paper. It uses ``hzo`` alone."""
