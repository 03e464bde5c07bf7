/// A structure that may be copied out of a request as it lies there: every pattern of its bytes is a value, it has no
/// padding, and its layout is the specification's (little-endian).
public protocol RequestBytes: BitwiseCopyable {}

extension UInt8: RequestBytes {}
extension UInt16: RequestBytes {}
extension UInt32: RequestBytes {}
extension UInt64: RequestBytes {}
extension BlockRequestType: RequestBytes {}
extension BlockRequestHeader: RequestBytes {}
extension BlockRangeSegment: RequestBytes {}
extension NetHeader: RequestBytes {}
extension ConsoleControl: RequestBytes {}
