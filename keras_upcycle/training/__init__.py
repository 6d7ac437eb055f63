"""What runs beside `fit`: schedules, frozen parts, a monitor, progress."""
