/// What is wrong with this back end; set once at the start, before anything else runs.
enum Defects {
  nonisolated(unsafe) static var chosen: Set<String> = []
}

func has(_ defect: String) -> Bool { Defects.chosen.contains(defect) }
