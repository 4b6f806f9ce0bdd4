"""What the experts do: exact counts, statistics, reports and pictures, the balance bias, routers trained by reward."""
