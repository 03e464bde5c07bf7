import HostSystem

/// Text for people and programs, on standard output or error. Nothing is buffered.
struct Output: Sendable {
  private let number: CInt

  static let standard = Output(number: 1)
  static let error = Output(number: 2)

  func write(_ text: String) {
    // Borrowed for the call, never closed: released again below.
    let fd = OwnedFD(owning: number)
    // Nobody can be told that the reader of our output is gone.
    try? fd.writeAll(Array(text.utf8))
    _ = fd.release()
  }

  /// Columns padded to their widest entry, two blanks between them.
  static func table(_ rows: [[String]]) -> String {
    let columns = rows.map(\.count).max() ?? 0
    let widths = (0..<columns).map { column in rows.map { column < $0.count ? $0[column].count : 0 }.max() ?? 0 }
    var text = ""
    for row in rows {
      var line = ""
      for (column, cell) in row.enumerated() {
        line += cell
        if column < row.count - 1 { line += String(repeating: " ", count: widths[column] - cell.count + 2) }
      }
      while line.last == " " { line.removeLast() }
      text += line + "\n"
    }
    return text
  }
}
